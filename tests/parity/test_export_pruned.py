"""Pruned models, from their bundles on disk to the runtimes, in float and int8."""

from __future__ import annotations

import copy

import pytest

from kdrecipe.interfaces import CompressContext
from kdrecipe.measure.parity import check_parity
from kdrecipe.model.bundle import Bundle, compressor_state
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.sections import Parity
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.structured_prune import StructuredPrune
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer
from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention

REGISTRY = load_plugins().registry
ALL = ["heads", "units", "channels", "width"]
# what is left of the words after such a cut is no matter here
LOOSE = Parity(
    max_token_error=1,
    max_token_error_runtime=1,
    max_wer_increase=100,
    max_deletion_increase=100,
)


def shrunk(bundle, directory, *steps):
    """The bundle on disk after compressors, built again from there."""
    model, done = copy.deepcopy(bundle.model), []
    for name, compressor in steps:
        model = compressor.finish(compressor.apply(model, CompressContext(lambda: []))).eval()
        state = compressor_state(name, compressor)
        options = compressor.config.model_dump(mode="json")
        done.append({"name": name, "options": options, "report": compressor.report(), "state": state})
    Bundle.save(directory, model, bundle.tokens, {**bundle.meta, "compression": done})
    return Bundle.load(directory, REGISTRY)


def pruner(*parts, share=0.4, **options):
    options = {"share": share, "kinds": ALL, "parts": parts, "score": "magnitude", "epochs": 0, **options}
    options.setdefault("multiple_of", 1)
    return "structured_prune", StructuredPrune(StructuredPrune.Config(**options))


INT8 = ("int8_dynamic", Int8Dynamic(Int8Dynamic.Config()))


@pytest.mark.parametrize("steps", [(), (INT8,)], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("cls", "head"),
    [
        (OnnxCtc, None),
        (OnnxTransducer, "rnnt"),
        (OnnxAttention, "attention"),
        (SherpaAttention, "attention"),
    ],
)
def test_a_pruned_model_says_the_same_everywhere(trained, all_heads, tmp_path, cls, head, steps):
    made = trained if head is None else all_heads
    parts = ("encoder",) if head is None else ("encoder", head)
    bundle = shrunk(made.bundle, tmp_path / "bundle", pruner(*parts), *steps)
    exporter = cls(cls.Config())
    files = exporter.export(bundle, tmp_path / "export")
    found = check_parity(bundle, exporter, tmp_path / "export", made.utterances[:4], LOOSE)
    assert found["fp32"]["kl"] < 1e-6
    assert found["int8"]["kl"] < 5e-2
    exporter.export(made.bundle, tmp_path / "parent")
    sizes = [sum((tmp_path / d / f).stat().st_size for f in files["fp32"]) for d in ("export", "parent")]
    assert sizes[0] < 0.75 * sizes[1], "the file itself is smaller"
