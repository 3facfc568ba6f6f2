"""Every number format, from the compressor to the runtimes: the file computes what the bundle scored."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from kdrecipe.errors import KdrecipeError, ParityError
from kdrecipe.interfaces import Batch, CompressContext
from kdrecipe.measure.parity import check_parity
from kdrecipe.measure.strain import Strain
from kdrecipe.model.bundle import Bundle, build_compressor, compressor_state
from kdrecipe.recipe.sections import Parity
from kdrecipe_plugins.compressors.integer_layers import Int4Linear, StaticInt8Linear
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer
from kdrecipe_plugins.exporters.torchscript import TorchScript

EXPORTERS = {cls.head: cls for cls in (OnnxCtc, OnnxAttention, OnnxTransducer)}
ANY_WORDS = {"max_token_error": 1.0, "max_wer_increase": 100.0, "max_deletion_increase": 100.0}
STEPS = {
    "int8_static": ("int8_qdq", {"name": "int8_static", "options": {}}),
    "int4": ("int4", {"name": "int4", "options": {"group": 16}}),
    "mixed": (
        "int4",
        {"name": "int8_dynamic", "options": {"layers": {"*.ff1.*": "int4", "heads.*": "float"}}},
    ),
}


def calibration(bundle: Bundle, utterances) -> CompressContext:
    from kdrecipe.data.features import extract

    def batches():
        for utterance in utterances:
            features_TF = torch.from_numpy(extract(utterance.samples_S, 16000, bundle.meta["features"]))
            tokens = torch.tensor(bundle.tokens.encode(utterance.text))
            yield Batch(
                [utterance.id], features_TF[None], torch.tensor([len(features_TF)]),
                tokens[None], torch.tensor([len(tokens)]), torch.ones(1, dtype=torch.bool),
            )  # fmt: skip

    return CompressContext(batches)


def compressed(trained, step, path) -> Bundle:
    """The float bundle after a step, saved and loaded again."""
    bundle = trained.bundle
    compressor = build_compressor(bundle.registry, step)
    model = copy.deepcopy(bundle.model)
    model = compressor.finish(compressor.apply(model, calibration(bundle, trained.utterances[6:])))
    done = {**step, "report": compressor.report(), "state": compressor_state(step["name"], compressor)}
    meta = {key: bundle.meta[key] for key in ("name", "kind", "parent", "seed", "model", "features")}
    Bundle.save(path, model, bundle.tokens, {**meta, "compression": [done]})
    return Bundle.load(path, bundle.registry)


@pytest.fixture(scope="module", params=STEPS)
def small(request, all_heads, tmp_path_factory):
    variant, step = STEPS[request.param]
    return variant, compressed(all_heads, step, tmp_path_factory.mktemp(request.param))


def constants(path) -> list[np.ndarray]:
    return [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("head", EXPORTERS)
def test_a_file_computes_what_its_bundle_scored(small, all_heads, tmp_path, head):
    variant, bundle = small
    cls = EXPORTERS[head]
    exporter = cls(cls.Config())
    assert cls.ships(bundle.number_formats) == variant
    written = exporter.export(bundle, tmp_path)
    assert list(written) == ["fp32", variant]  # int8 and int4 are what a float bundle would be rounded to
    found = check_parity(bundle, exporter, tmp_path, all_heads.utterances[:4], Parity(**ANY_WORDS))
    assert found[variant]["kl"] < 1e-4
    assert found[variant]["token_error"] < 0.05
    assert max(figures["kl"] for figures in found[variant]["strain"].values()) < 5e-4
    sizes = [
        sum((tmp_path / name).stat().st_size for name in cls.files[v].values()) for v in ("fp32", variant)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_graph_has_the_compressors_integers_and_scales(all_heads, tmp_path):
    for kind in ("int8_static", "int4"):
        variant, step = STEPS[kind]
        bundle = compressed(all_heads, step, tmp_path / f"bundle_{kind}")
        OnnxCtc(OnnxCtc.Config()).export(bundle, tmp_path / variant)
        found = {x.tobytes() for x in constants(tmp_path / variant / OnnxCtc.files[variant]["model"])}
        cls = {"int8_static": StaticInt8Linear, "int4": Int4Linear}[kind]
        layers = [m for m in bundle.model.encoder.modules() if type(m) is cls]
        assert len(layers) > 5
        for layer in layers:
            if kind == "int4":
                assert layer.scale_OG.numpy().tobytes() in found
                continue
            assert layer.weight.detach().t().contiguous().numpy().tobytes() in found
            assert layer.scale_O.numpy().tobytes() in found
            assert layer.input_scale.numpy().tobytes() in found


def test_a_float_bundle_in_all_variants(trained, tmp_path):
    names = ("fp32", "fp16", "int8", "int4")
    exporter = OnnxCtc(OnnxCtc.Config(variants=names))
    assert tuple(exporter.export(trained.bundle, tmp_path)) == names
    figures = check_parity(trained.bundle, exporter, tmp_path, trained.utterances)
    sizes = [(tmp_path / OnnxCtc.files[name]["model"]).stat().st_size for name in names]
    assert [size / sizes[0] < bound for size, bound in zip(sizes, (1.01, 0.55, 0.34, 0.27), strict=True)] == [
        True
    ] * 4
    assert figures["fp32"]["kl"] < figures["fp16"]["kl"] < figures["int8"]["kl"] < figures["int4"]["kl"]
    for name in names:  # as sherpa-onnx loads it
        assert exporter.load(tmp_path, name).transcribe(trained.utterances[0].samples_S, 16000).text


def test_a_quantised_bundle_in_torchscript(small, all_heads, tmp_path):
    variant, bundle = small
    script = TorchScript(TorchScript.Config())
    script.export(bundle, tmp_path)
    own = TorchScript.ships(bundle.number_formats)
    assert own == variant.removesuffix("_qdq")
    found = check_parity(bundle, script, tmp_path, all_heads.utterances[:2], Parity(**ANY_WORDS))
    assert found[own]["kl"] < 1e-6


def test_int8_loses_no_more_on_long_audio_and_with_a_click(trained, exports):
    """Scales per frame: what one frame says does not depend on how many others there are, nor how loud."""
    strain = Strain(trained.bundle.model, "ctc", trained.utterances, trained.bundle.meta["features"], [])
    runner = OnnxCtc(OnnxCtc.Config()).load(exports / "float", "int8")
    kl = {name: figures["kl"] for name, figures in strain.compare(runner, strain.expected).items()}
    assert list(kl) == ["5 s", "20 s", "40 s", "click"]
    assert kl["5 s"] > 0
    assert max(kl.values()) < 2 * kl["5 s"]


def test_the_gate_sees_a_variant_that_fails_on_long_audio(trained, exports):
    class Tired(OnnxCtc):
        def load(self, directory, variant, *, num_threads=1):
            runner = super().load(directory, variant)
            plain = runner.log_probs

            def log_probs(features_BTF, lens_B):
                log_probs_BTV, out_lens_B = plain(features_BTF, lens_B)
                if features_BTF.shape[1] > 3000:
                    log_probs_BTV = np.roll(log_probs_BTV, 1, axis=2)
                return log_probs_BTV, out_lens_B

            runner.log_probs = log_probs
            return runner

    with pytest.raises(ParityError, match=r"nats per frame \(40 s of audio\).*parity.max_kl") as caught:
        check_parity(trained.bundle, Tired(Tired.Config()), exports / "float", trained.utterances)
    assert all("(40 s of audio)" in problem.what for problem in caught.value.problems)


def test_a_layer_that_onnx_lacks_is_named_with_a_remedy(trained, tmp_path):
    class Foreign(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svd(x).U

    bundle = Bundle.load(trained.bundle.path, trained.bundle.registry)
    bundle.model.heads["ctc"].proj = Foreign()
    with pytest.raises(KdrecipeError, match=r"tiny: the model can't be written in ONNX opset 17.*svd"):
        OnnxCtc(OnnxCtc.Config()).export(bundle, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))
