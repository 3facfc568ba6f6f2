"""Every number format as a row of one recipe, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import kdrecipe, write_recipe

from kdrecipe.testing.corpus import make_corpus

RECIPE = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: char}
seeds: [1]
training: {epochs: 3, batch_duration_s: 8, precision: fp32, lr: 4.0e-3}
systems:
  kd: {train: {model: {name: conformer, num_layers: 1, dim: 32, heads: {ctc: {}}}}}
  int8: {compress: {from: kd, steps: [{name: int8_dynamic}]}}
  static: {compress: {from: kd, steps: [{name: int8_static}]}}
  int4: {compress: {from: kd, steps: [{name: int4}]}}
  mixed: {compress: {from: kd, steps: [{name: int8_static, layers: {"*.ff1.*": int4, "heads.*": float}}]}}
  chain:
    compress:
      from: kd
      steps: [{name: magnitude_prune, epochs: 1}, {name: qat, epochs: 1, format: int8_static}]
export: [{name: onnx_ctc, variants: [fp32, fp16, int8, int4]}]
decode: {splits: [test], measure_max: 2, robustness: 0}
parity: {num_utterances: 2, max_token_error: 1, max_wer_increase: 100, max_deletion_increase: 100}
"""
SHIPS = {
    "kd": "fp32",
    "int8": "int8",
    "static": "int8_qdq",
    "int4": "int4",
    "mixed": "int8_qdq",
    "chain": "int8_qdq",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("formats")
    corpus = make_corpus(directory / "corpus", num_speakers=5, utterances_per_speaker=6)
    recipe = write_recipe(directory / "formats", RECIPE)
    done = kdrecipe("run", recipe, "--work", directory / "work", "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    return directory / "work"


def system(work: Path, name: str) -> dict[str, Any]:
    results = json.loads((work / "report" / "results.json").read_text())
    found: dict[str, Any] = next(s for s in results["systems"] if s["name"] == name)
    return found


@pytest.mark.parametrize("name", SHIPS)
def test_each_row_is_its_own_variant_in_the_runtime(work, name):
    row = system(work, name)
    assert (row["search"]["runs_in"], row["search"]["variant"]) == ("sherpa-onnx", SHIPS[name])
    files = sorted(p.name for p in (work / "exports" / name / "seed1" / "onnx_ctc").glob("*.onnx"))
    own = {"fp32", "fp16", SHIPS[name]} | ({"int8", "int4"} if name == "kd" else set())
    assert files == sorted("model.onnx" if v == "fp32" else f"model.{v}.onnx" for v in own)
    parity = json.loads((work / "exports" / name / "seed1" / "parity.json").read_text())["onnx_ctc"]["parity"]
    assert set(parity) >= own
    assert parity[SHIPS[name]]["kl"] < 1e-3
    assert row["splits"]["test"]["wer"]["mean"] is not None


def test_sizes_say_what_ships(work):
    sizes = {name: system(work, name)["size_mb"] for name in SHIPS}
    assert sizes["int4"] < sizes["int8"] < 0.5 * sizes["kd"]
    assert sizes["chain"] < 0.5 * sizes["kd"]


def test_the_chain_is_still_pruned_and_its_steps_are_reported(work):
    bundle = json.loads((work / "systems" / "chain" / "seed1" / "bundle.json").read_text())
    prune, qat = bundle["compression"]
    assert prune["report"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert qat["report"]["times_smaller"] > 3
    assert bundle["number_format"] == "int8+int8_static"
    import torch

    weights = torch.load(work / "systems" / "chain" / "seed1" / "weights.pt")
    encoder = [w for name, w in weights.items() if w.dtype == torch.int8 and name.startswith("encoder")]
    assert sum(int((w == 0).sum()) for w in encoder) > 0.4 * sum(w.numel() for w in encoder)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{name: int4}, {name: int8_static}]", "int8_static comes after int4"),
        ("[{name: qat, epochs: 0}]", "epochs"),
        ("[{name: int8_static, smooth: 2}]", "smooth"),
        ("[{name: int4, group: 7}]", "group"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, steps, said):
    text = RECIPE.replace("[{name: int8_dynamic}]", steps)
    recipe = write_recipe(tmp_path / "wrong", text)
    (tmp_path / "corpus").mkdir()
    done = kdrecipe("check", recipe, CORPUS_ROOT=tmp_path / "corpus")
    assert done.status == 2
    assert said in done.err
    assert "recipe.yaml:" in done.err
    assert "Traceback" not in done.said


def test_bounds_of_a_variant_that_nobody_writes_are_refused(tmp_path):
    recipe = write_recipe(tmp_path / "wrong", RECIPE.replace("parity: {", "parity: {max_kl: {int9: 0.1}, "))
    (tmp_path / "corpus").mkdir()
    done = kdrecipe("check", recipe, CORPUS_ROOT=tmp_path / "corpus")
    assert done.status == 2
    assert "no exporter in export has a variant 'int9'" in done.err
    assert "int8" in done.err
