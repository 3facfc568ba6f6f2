"""Encoders other than the Conformer, from training to sherpa-onnx, in float and int8."""

import copy

import onnx
import pytest
from conftest import train

from kdrecipe.cli.transcribe import BundleRunner
from kdrecipe.interfaces import CompressContext
from kdrecipe.measure.parity import check_parity
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc

ENCODERS = {
    "cnn": {"num_layers": 2, "dim": 48, "repeats": 2, "kernel_size": 9},
    "bilstm": {"num_layers": 1, "dim": 64},
}


@pytest.fixture(scope="module", params=ENCODERS)
def bundles(request, tmp_path_factory):
    options = {**ENCODERS[request.param], "dropout": 0.0, "heads": {"ctc": {}}}
    return train(tmp_path_factory.mktemp(request.param), {"name": request.param, **options}, num_epochs=40)


def test_an_encoder_exports_in_float_and_int8(bundles, tmp_path):
    exporter = OnnxCtc(OnnxCtc.Config())
    for kind, bundle in (("float", bundles.bundle), ("int8", bundles.int8)):
        exporter.export(bundle, tmp_path / kind)
        found = check_parity(bundle, exporter, tmp_path / kind, bundles.utterances)
        assert found["fp32"]["kl"] < 1e-6, kind
        assert found["int8"]["kl"] < 5e-3, kind
        fp32, int8 = ((tmp_path / kind / f"model{v}.onnx").stat().st_size for v in ("", ".int8"))
        assert int8 < 0.42 * fp32, kind
    torch_runner, runner = BundleRunner(bundles.bundle.path), exporter.load(tmp_path / "float", "fp32")
    num_words = 0
    for utterance in bundles.utterances[:4]:
        expected = torch_runner.transcribe(utterance.samples_S, 16000)
        found = runner.transcribe(utterance.samples_S, 16000)
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        num_words += len(expected.text.split())
    assert num_words > 4


def test_lstms_are_stored_in_8_bits_and_compute_in_float(tmp_path_factory, tmp_path):
    options = {**ENCODERS["bilstm"], "dropout": 0.0, "heads": {"ctc": {}}}
    bundles = train(tmp_path_factory.mktemp("lstm"), {"name": "bilstm", **options}, num_epochs=1)
    OnnxCtc(OnnxCtc.Config()).export(bundles.int8, tmp_path / "stored")
    model = copy.deepcopy(bundles.bundle.model)
    Int8Dynamic(Int8Dynamic.Config(others="float32")).apply(model, CompressContext(lambda: []))
    bundles.int8.model = model
    OnnxCtc(OnnxCtc.Config()).export(bundles.int8, tmp_path / "float")
    graph = onnx.load(tmp_path / "stored" / "model.int8.onnx").graph
    lstms = [node for node in graph.node if node.op_type == "LSTM"]
    assert len(lstms) == 2
    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert not any({*node.input[1:3]} & floats for node in lstms)
    sizes = [(tmp_path / n / "model.int8.onnx").stat().st_size for n in ("stored", "float")]
    assert sizes[0] < 0.6 * sizes[1]
