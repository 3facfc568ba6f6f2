"""``onnx_transducer`` in sherpa-onnx."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from kdrecipe.cli.bench import bench
from kdrecipe.cli.transcribe import BundleRunner, open_runner
from kdrecipe.data.features import extract
from kdrecipe.errors import KdrecipeError, ParityError
from kdrecipe.measure.edits import edits
from kdrecipe.measure.parity import check_parity
from kdrecipe.measure.reference import reference
from kdrecipe.measure.runtime import measure_export
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.suitable import exporters_for
from kdrecipe_plugins.compressors.integer_layers import Int8Linear
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer, OnnxTransducerRunner

FILES = [f"{part}{infix}.onnx" for infix in ("", ".int8") for part in ("encoder", "decoder", "joiner")]


def exporter(**options) -> OnnxTransducer:
    return OnnxTransducer(OnnxTransducer.Config(**options))


def initialisers(path) -> list[np.ndarray]:
    return [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


def test_files_are_those_that_sherpa_onnx_loads(transducers, all_heads):
    assert sorted(p.name for p in (transducers / "float").iterdir()) == sorted([*FILES, "tokens.txt"])
    shapes = {}
    for part in ("encoder", "decoder", "joiner"):
        model = onnx.load(transducers / "float" / f"{part}.int8.onnx")
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            shapes[part, value.name] = [d.dim_value or d.dim_param for d in dims]
    size = len(all_heads.bundle.tokens)
    assert shapes == {
        ("encoder", "x"): ["N", "T", 80],
        ("encoder", "x_lens"): ["N"],
        ("encoder", "encoder_out"): ["N", "T_out", 48],
        ("encoder", "encoder_out_lens"): ["N"],
        ("decoder", "y"): ["N", 2],
        ("decoder", "decoder_out"): ["N", 48],
        ("joiner", "encoder_out"): ["N", 48],
        ("joiner", "decoder_out"): ["N", 48],
        ("joiner", "logit"): ["N", size],
    }
    properties = {p.key: p.value for p in model.metadata_props}
    assert (properties["vocab_size"], properties["context_size"]) == (str(size), "2")


def test_nothing_of_other_heads_or_of_training_is_exported(transducers, all_heads):
    model = all_heads.bundle.model
    head = model.heads["rnnt"]
    parts = (model.encoder, head.predictor, head.encoder_proj, head.predictor_proj, head.output)
    expected = sum(p.numel() for part in parts for p in part.parameters())
    (row, _) = bench(transducers / "float")
    assert row["params"] == expected
    stored = sum(w.size for part in FILES[:3] for w in initialisers(transducers / "float" / part))
    assert expected <= stored < expected + 3000  # positions and shapes


@pytest.mark.parametrize("search", ["greedy_search", "modified_beam_search"])
def test_sherpa_onnx_recognises_what_the_bundle_does_and_when(transducers, all_heads, search):
    decoder = {"greedy_search": "rnnt_greedy", "modified_beam_search": "rnnt_beam"}[search]
    ours = BundleRunner(all_heads.bundle.path, decoder)
    theirs = OnnxTransducerRunner(transducers / "float", "fp32", search=search)
    num_words = 0
    for utterance in all_heads.utterances[:8]:
        expected = ours.transcribe(utterance.samples_S, 16000)
        found = theirs.transcribe(utterance.samples_S, 16000)
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        assert found.times_s == pytest.approx(expected.times_s, abs=1e-4)
        num_words += len(found.text.split())
    assert num_words > 6


@pytest.mark.parametrize(("kind", "num"), [("float", 1), ("float", 3), ("int8", 2)])
def test_log_posteriors_along_a_path_equal_torch(transducers, all_heads, kind, num):
    from kdrecipe.interfaces import float_copy

    bundle = {"float": all_heads.bundle, "int8": all_heads.int8}[kind]
    model = float_copy(bundle.model)
    features = [extract(u.samples_S, 16000, bundle.meta["features"]) for u in all_heads.utterances[:num]]
    wanted = [reference(model, "rnnt", f) for f in features]
    assert any(label for path in wanted for label in path.path)
    lens_B = np.array([len(f) for f in features])
    features_BTF = np.zeros((num, lens_B.max(), 80), dtype=np.float32)
    for row, features_TF in zip(features_BTF, features, strict=True):
        row[: len(features_TF)] = features_TF
    runner = exporter().load(transducers / kind, "fp32")
    found = runner.log_probs_along(features_BTF, lens_B, [w.path for w in wanted])
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b, a.log_probs_MV, atol=2e-4)
    assert [runner.greedy(f) for f in features] == [w.tokens for w in wanted]


def test_int8_files_hold_the_weights_of_an_int8_bundle_exactly(transducers, all_heads):
    stored = {
        w.tobytes()
        for name in FILES[3:]
        for w in initialisers(transducers / "int8" / name)
        if w.dtype == np.int8
    }
    model = all_heads.int8.model
    used = [m for m in model.encoder.modules() if isinstance(m, Int8Linear)]
    head = model.heads["rnnt"]
    used += [head.predictor.conv, head.encoder_proj, head.predictor_proj, head.output]
    for layer in used:
        assert layer.weight.detach().t().contiguous().numpy().tobytes() in stored


def test_int8_files_are_a_third_of_the_fp32_ones(transducers):
    sizes = [
        sum((transducers / "float" / n).stat().st_size for n in names) for names in (FILES[:3], FILES[3:])
    ]
    assert sizes[1] < sizes[0] / 2.6  # files this small are half names and shapes


def test_parity_of_both_bundles(transducers, all_heads):
    for kind, bundle in (("float", all_heads.bundle), ("int8", all_heads.int8)):
        figures = check_parity(bundle, exporter(), transducers / kind, all_heads.utterances)
        assert figures["fp32"]["max_log_prob_diff"] < 1e-3
        assert figures["fp32"]["runtime_token_error"] < 0.02
        assert 0 < figures["int8"]["kl"] < 0.02


def test_parity_sees_another_predictor(all_heads, tmp_path):
    bundle = Bundle.load(all_heads.bundle.path, all_heads.bundle.registry)
    with torch.no_grad():
        bundle.model.heads["rnnt"].predictor.conv.weight.mul_(1.2)
    exporter().export(bundle, tmp_path)
    with pytest.raises(ParityError, match="fp32: largest difference"):
        check_parity(all_heads.bundle, exporter(), tmp_path, all_heads.utterances[:4])


def test_measured_in_sherpa_onnx(transducers, all_heads):
    measured = measure_export(OnnxTransducer, transducers / "float", "int8", all_heads.utterances[:4])
    runner = exporter().load(transducers / "float", "int8")
    for utterance in all_heads.utterances[:4]:
        assert measured.texts[utterance.id] == runner.transcribe(utterance.samples_S, 16000).text
    assert measured.size_mb == sum((transducers / "float" / n).stat().st_size for n in FILES[3:]) / 1e6
    assert 10 < measured.baseline_rss_mb < measured.peak_rss_mb < 150
    assert measured.runtime.startswith("sherpa-onnx")


@pytest.mark.parametrize("name", ["", "encoder.int8.onnx", "joiner.onnx"])
def test_transcribe_knows_a_transducer_by_its_files(transducers, all_heads, name):
    runner, _ = open_runner(transducers / "float" / name)
    assert isinstance(runner, OnnxTransducerRunner)
    expected = BundleRunner(all_heads.bundle.path).transcribe(all_heads.utterances[0].samples_S, 16000)
    found = runner.transcribe(all_heads.utterances[0].samples_S, 16000)
    assert edits(expected.tokens, found.tokens).errors <= 1


def test_an_lstm_is_refused(all_heads, tmp_path):
    bundle = Bundle.load(all_heads.bundle.path, all_heads.bundle.registry)
    description = {**bundle.meta["model"], "heads": {"rnnt": {"predictor": "lstm"}}}
    bundle.__dict__["model"] = build_model(
        description, input_dim=80, vocab_size=len(bundle.tokens), registry=bundle.registry
    ).eval()
    with pytest.raises(KdrecipeError, match=r"this one is an LSTM\n.*predictor: stateless"):
        exporter().export(bundle, tmp_path)


RECIPE = """
corpus: {name: voice_commands}
tokens: {name: bpe, vocab_size: 64}
systems:
  student:
    train:
      model: {name: conformer, heads: HEADS}
      losses: [{name: rnnt}]
"""


@pytest.mark.parametrize(
    ("heads", "exporters"),
    [
        ("{rnnt: {predictor: lstm}}", []),
        ("{ctc: {}, rnnt: {predictor: lstm}}", ["onnx_ctc", "torchscript"]),
        ("{ctc: {}, rnnt: {}}", ["onnx_ctc", "onnx_transducer", "torchscript"]),
    ],
)
def test_an_lstm_keeps_its_row_and_is_passed_over(tmp_path, heads, exporters):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("HEADS", heads))
    recipe = load_recipe(path)
    model = recipe.model_of("student")
    found = exporters_for(model, recipe.export, recipe.plugins.registry)
    assert [e.name for e in found] == exporters


def test_a_model_without_a_transducer_is_refused(trained, tmp_path):
    with pytest.raises(KdrecipeError, match="exports the head 'rnnt', the model has ctc"):
        exporter().export(trained.bundle, tmp_path)


def test_another_frame_rate_is_refused(all_heads, tmp_path):
    meta = {**all_heads.bundle.meta, "frame_shift_s": 0.02}
    with pytest.raises(KdrecipeError, match=r"every 0.02 s"):
        exporter().export(Bundle(all_heads.bundle.path, meta, all_heads.bundle.registry), tmp_path)


def test_missing_and_damaged_files_are_named(transducers, all_heads, tmp_path):
    shutil.copytree(transducers / "float", tmp_path / "broken")
    (tmp_path / "broken" / "decoder.onnx").write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match=r"decoder\.onnx: onnxruntime can't load"):
        exporter().load(tmp_path / "broken", "fp32").transcribe(np.zeros(16000), 16000)
    with pytest.raises(KdrecipeError, match="sherpa-onnx could not run the model"):
        measure_export(OnnxTransducer, tmp_path / "broken", "fp32", all_heads.utterances[:1])
    (tmp_path / "broken" / "joiner.int8.onnx").unlink()
    for action in (
        lambda: exporter().load(tmp_path / "broken", "int8"),
        lambda: measure_export(OnnxTransducer, tmp_path / "broken", "int8", all_heads.utterances[:1]),
    ):
        with pytest.raises(KdrecipeError, match=r"joiner\.int8\.onnx: there is no such file"):
            action()
