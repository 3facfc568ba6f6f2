"""A row of the table is one search in one place: its WER and its time, through the real command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
from runs import kdrecipe, write_recipe

from kdrecipe.data.features import load_cuts
from kdrecipe.measure.conditions import CONDITIONS
from kdrecipe.testing.corpus import make_corpus
from kdrecipe_plugins.exporters.attention_runtime import Recogniser
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducerRunner
from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention
from kdrecipe_plugins.metrics.wer import TextOptions, Wer

HEADS = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: char}
seeds: [1]
training: {epochs: 3, batch_duration_s: 8, precision: fp32, lr: 4.0e-3}
systems:
  ctc: {train: {model: {name: conformer, num_layers: 1, dim: 32, heads: {ctc: {}}}}}
  attention:
    train:
      model: {name: conformer, num_layers: 1, dim: 32, heads: {attention: {num_layers: 1}, ctc: {}}}
      losses: [{name: attention}, {name: ctc}]
  attention_int8: {compress: {from: attention, steps: [{name: int8_dynamic}]}}
  rnnt:
    train:
      model: {name: conformer, num_layers: 1, dim: 32, heads: {rnnt: {predictor_dim: 16, joiner_dim: 32}}}
      losses: [{name: rnnt}]
      training: {epochs: 25, lr: 1.0e-2}
  rnnt_lstm:
    train:
      model:
        name: conformer
        num_layers: 1
        dim: 32
        heads: {rnnt: {predictor: lstm, predictor_dim: 16, joiner_dim: 32}}
      losses: [{name: rnnt}]
decode:
  splits: [test, dev]
  measure_max: 2
  decoders:
    ctc_beam: {name: ctc_prefix_beam, beam: 2}
    joint: {name: attention_beam, beam: 3, ctc_weight: 0.4, max_len_ratio: 0.5}
    greedy: {name: attention_greedy}
    paths: {name: rnnt_beam, beam: 2}
export: [{name: onnx_ctc}, {name: onnx_transducer}, {name: sherpa_attention}, {name: onnx_attention}]
parity:
  num_utterances: 2
  max_token_error: 1
  max_wer_increase: 100
  max_deletion_increase: 100
"""
SHIPPED = {
    "attention": ("joint", "onnxruntime", "joint_beam", "fp32"),
    "attention_int8": ("joint", "onnxruntime", "joint_beam", "int8"),
    "rnnt": ("paths", "sherpa-onnx", "modified_beam_search", "fp32"),
}
IN_TORCH = {
    "ctc": ("ctc_beam", "not measured: sherpa-onnx has no search ctc_prefix_beam"),
    "rnnt_lstm": (
        "paths",
        "not measured: sherpa-onnx's transducers have a predictor without state, this one",
    ),
}


@dataclass
class Work:
    """A run's directory and its results."""

    dir: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.dir / "report" / "results.json").read_text())

    def system(self, name: str) -> dict[str, Any]:
        return next(s for s in self.results["systems"] if s["name"] == name)

    def hyps(self, system: str, name: str = "test.jsonl") -> list[dict[str, Any]]:
        lines = (self.dir / "hyps" / system / "seed1" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def decoded(self, system: str) -> dict[str, Any]:
        return json.loads((self.dir / "hyps" / system / "seed1" / "decode.json").read_text())

    def audio(self, split: str) -> dict[str, Any]:
        """Utterance -> its file."""
        cuts: Any = load_cuts(self.dir / "features", split)
        return {cut.id: cut.recording.sources[0].source for cut in cuts}

    def in_the_runtime(self, system: str, split: str) -> dict[str, str]:
        """What the shipped files say, run here by the options of the recipe."""
        exports, variant = self.dir / "exports" / system / "seed1", SHIPPED[system][-1]
        if system == "rnnt":
            runner = OnnxTransducerRunner(
                exports / "onnx_transducer", variant, search="modified_beam_search", beam=2
            )
            recognise = runner.transcribe
        else:
            recogniser = Recogniser.load(exports / "onnx_attention", variant)
            options = {"beam": 3, "ctc_weight": 0.4, "max_len_ratio": 0.5}

            def recognise(samples_S, sample_rate):
                return recogniser.recognise(samples_S, sample_rate, **options)

        audio = {i: soundfile.read(path, dtype="float32") for i, path in self.audio(split).items()}
        return {i: recognise(*sound).text for i, sound in audio.items()}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    directory = tmp_path_factory.mktemp("rows")
    corpus = make_corpus(directory / "corpus", num_speakers=5, utterances_per_speaker=8)
    recipe = write_recipe(directory / "heads", HEADS)
    done = kdrecipe("run", recipe, "--work", directory / "work", "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    return Work(directory / "work")


def wer(rows: list[dict[str, Any]]) -> float:
    counted = [Wer(TextOptions()).errors(row["ref"], row["hyp"]) for row in rows]
    return sum(errors for errors, _ in counted) / sum(length for _, length in counted)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_scored_is_what_the_shipped_files_say_by_the_rows_search(work, name):
    for split in ("test", "dev"):
        rows = work.hyps(name, f"{split}.jsonl")
        assert {row["id"]: row["hyp"] for row in rows} == work.in_the_runtime(name, split)
        assert work.system(name)["splits"][split]["wer"]["mean"] == pytest.approx(wer(rows), abs=1e-6)
    assert any(row["hyp"] for row in work.hyps(name))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_time_beside_it_is_of_that_search_on_all_utterances(work, name):
    label, runs_in, called, variant = SHIPPED[name]
    system, decoded = work.system(name), work.decoded(name)
    search = system["search"]
    assert [search[key] for key in ("label", "runs_in", "name", "variant")] == [
        label,
        runs_in,
        called,
        variant,
    ]
    assert decoded["runtime_search"] == called, "as the measurement itself names it"
    assert decoded["measured_on"]["utterances"] == len(work.hyps(name))
    assert system["rtf"] == decoded["rtf"]
    assert 0 < system["rtf"]["median"] <= system["rtf"]["p95"]
    assert system["runtime"].startswith(runs_in)
    assert system["runtime"].endswith(f"1 thread, {variant}")
    exports = (
        work.dir / "exports" / name / "seed1" / ("onnx_transducer" if name == "rnnt" else "onnx_attention")
    )
    ending = ".int8.onnx" if variant == "int8" else ".onnx"
    files = [f for f in exports.glob(f"*{ending}") if variant == "int8" or ".int8" not in f.name]
    assert system["size_mb"] == pytest.approx(sum(f.stat().st_size for f in files) / 1e6)


def test_greedy_rows_of_attention_are_measured_in_sherpa_onnx(work, tmp_path):
    place = Work(shutil.copytree(work.dir, tmp_path / "work"))
    options = ("--work", place.dir, "--jobs", "1", "--set", "decode.decoders.joint=null")
    corpus = work.dir.parent / "corpus"
    done = kdrecipe("run", work.dir.parent / "heads", *options, CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    assert "stage 7 export: 5 jobs up to date" in done.out
    for name, variant in (("attention", "fp32"), ("attention_int8", "int8")):
        exports = place.dir / "exports" / name / "seed1" / "sherpa_attention"
        system = place.system(name)
        search = system["search"]
        assert [search[key] for key in ("runs_in", "name", "variant")] == [
            "sherpa-onnx",
            "greedy_search",
            variant,
        ]
        files = [exports / file for file in SherpaAttention.files[variant].values()]
        assert system["size_mb"] == pytest.approx(sum(f.stat().st_size for f in files) / 1e6)
        runner = SherpaAttention(SherpaAttention.Config()).load(exports, variant)
        audio = {i: soundfile.read(path, dtype="float32") for i, path in place.audio("test").items()}
        said = {row["id"]: row["hyp"] for row in place.hyps(name)}
        assert said == {i: runner.transcribe(*sound).text for i, sound in audio.items()}
        assert any(said.values())


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_search_that_the_runtime_lacks_makes_a_row_of_the_bundle_without_a_time(work, name):
    label, why = IN_TORCH[name]
    system = work.system(name)
    assert (system["search"]["label"], system["search"]["runs_in"]) == (label, "torch")
    assert system["rtf"] is None
    assert system["peak_rss_mb"] is None
    assert system["same_text_as_bundle"] is None
    assert (system["size_mb"] is not None) == (name == "ctc"), "the LSTM has no files"
    assert system["runtime"].startswith(why)
    assert work.hyps(name) == work.hyps(name, f"bundle/{label}/test.jsonl")
    text = (work.dir / "report" / "RESULTS.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} ") and "| trained" in line][:1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:5] == [label, "torch"]
    assert cells[-2:] == ["–", "–"]
    assert f"- {name}: what the bundle says in torch by {label}, without a time, since" in text


@pytest.mark.parametrize("name", [*SHIPPED, *IN_TORCH])
def test_robustness_is_of_the_search_and_the_files_of_the_row(work, name):
    said = {row["id"]: row["hyp"] for row in work.hyps(name)}
    clean = work.hyps(name, "robustness/clean.jsonl")
    assert {row["id"]: row["hyp"] for row in clean} == said
    found = work.results["robustness"]
    assert found["utterances"] == len(clean)
    assert found["metric"] == "wer"
    for condition, rate in found["systems"][name].items():
        rows = work.hyps(name, f"robustness/{condition}.jsonl")
        assert " ".join(row["ref"] for row in rows) == " ".join(row["ref"] for row in clean)
        assert rate == pytest.approx(wer(rows), abs=1e-6)
    assert list(found["systems"][name]) == list(found["conditions"]) == list(CONDITIONS)


def test_the_bundle_stands_beside_the_row(work):
    for name in SHIPPED:
        of_bundle = work.hyps(name, f"bundle/{SHIPPED[name][0]}/test.jsonl")
        assert work.system(name)["bundle"]["test"]["wer"] == pytest.approx(wer(of_bundle), abs=1e-6)
        said = {row["id"]: row["hyp"] for row in of_bundle}
        same = [row["hyp"] == said[row["id"]] for row in work.hyps(name)]
        assert work.system(name)["same_text_as_bundle"] == pytest.approx(sum(same) / len(same))
    text = (work.dir / "report" / "RESULTS.md").read_text(encoding="utf-8")
    assert "by the same search:" in text
    assert text.count("bundle's WER %") == 2, "of the parity gate on dev, and of the rows"


def test_other_searches_are_the_bundles_and_say_so(work):
    for search in ("joint", "greedy"):
        assert len(work.hyps("attention", f"bundle/{search}/test.jsonl")) == 8
    text = (work.dir / "report" / "RESULTS.md").read_text(encoding="utf-8")
    assert "## Searches on test, bundles in torch" in text
    assert "RTF (torch, 1 thread)" in text
    (row,) = [r for r in work.results["searches"] if (r["system"], r["search"]) == ("attention", "joint")]
    assert row["rtf"] != work.system("attention")["rtf"]["total"]
