"""Several searches of one system: how they are built, timed, named and compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from kdrecipe.corpus.audio import Utterance
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import (
    Bounds,
    Hypothesis,
    Metric,
    ModelOutput,
    Options,
    Runtime,
    RuntimeSearch,
    Variant,
)
from kdrecipe.measure.device import _num_params
from kdrecipe.measure.runtime import measure_files
from kdrecipe.measure.search import search_rtf
from kdrecipe.model.decoders import build_decoder
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.suitable import RuntimeOptions, default_search, measured_exporter, runtime_search
from kdrecipe.report.reading import reading
from kdrecipe.report.text import search_table
from kdrecipe.score.hypotheses import bundle_hyps_file, hyps_file
from kdrecipe.score.searches import pairs, score_searches
from kdrecipe.stages.rows import Row, row_of
from kdrecipe.testing.decode_checks import LetterTokens
from kdrecipe_plugins.metrics.cer import Cer
from kdrecipe_plugins.metrics.wer import TextOptions, Wer

METRICS: dict[str, Metric] = {"wer": Wer(TextOptions()), "cer": Cer(TextOptions())}
GREEDY = {"decoder": "ctc_greedy", "options": {}, "lm": False, "head": "ctc"}
BEAM = {
    "decoder": "ctc_beam",
    "options": {"beam": 8, "lm_weight": 0.0, "length_bonus": 0.0},
    "lm": False,
    "head": "ctc",
}
BEAM_LM = {
    "decoder": "ctc_beam",
    "options": {"beam": 8, "lm_weight": 0.3, "length_bonus": 0.5},
    "lm": True,
    "head": "ctc",
}


class Plain:
    head = "ctc"

    class Config(Options):
        """None."""

    def __init__(self, config: Any, tokens: Any, frame_shift_s: float) -> None:
        self.given = (tokens, frame_shift_s)


class WithLm:
    head = "ctc"

    class Config(Options):
        beam: int = 4
        lm_weight: float = Field(default=0.0, ge=0)

    def __init__(self, config: Any, tokens: Any, frame_shift_s: float, lm: Any) -> None:
        self.lm = lm


# ---------------------------------------------------------------- stage 8


def test_only_a_weighted_language_model_is_given() -> None:
    registry, lm = Registry(), object()
    bundle: Any = SimpleNamespace(
        registry=registry,
        path="b",
        tokens=LetterTokens(),
        meta={"model": {"heads": {"ctc": {}}}},
        head_shift_s=lambda head: 0.04,
    )
    registry.add("decoders", "plain", Plain, "here")
    registry.add("decoders", "fused", WithLm, "here")

    def built(name: str, **options: Any) -> Any:
        return build_decoder(bundle, Named(name, options), lm)  # type: ignore[arg-type]

    assert built("plain").given[1] == 0.04
    assert built("fused", lm_weight=0.0).lm is None
    assert built("fused", lm_weight=0.3).lm is lm
    bundle.meta["model"]["heads"] = {"rnnt": {}}
    with pytest.raises(KdrecipeError, match="'plain' searches the head 'ctc', the model has rnnt"):
        built("plain")


def test_hypotheses_of_the_row_and_of_the_bundle_lie_apart() -> None:
    assert hyps_file(Path("h"), "test") == Path("h/test.jsonl")
    assert bundle_hyps_file(Path("h"), "greedy", "test") == Path("h/bundle/greedy/test.jsonl")


def test_a_row_has_a_time_if_and_only_if_it_is_the_runtimes() -> None:
    shipped = {"label": "greedy", "runs_in": "sherpa-onnx"}
    in_torch = {"label": "beam", "runs_in": "torch"}
    Row(shipped, {}, list, {"rtf": {"median": 0.1}})
    Row(in_torch, {}, list, {"rtf": None})
    for search, rtf in ((in_torch, {"median": 0.1}), (shipped, None)):
        with pytest.raises(AssertionError, match="a row's time belongs to its own texts"):
            Row(search, {}, list, {"rtf": rtf})


def test_a_runtime_has_a_search_or_says_what_it_lacks() -> None:
    registry = Registry()
    registry.add("decoders", "plain", Plain, "here")
    registry.add("decoders", "fused", WithLm, "here")
    registry.add("decoders", "other", Plain, "here")
    runtime = Runtime(
        "box", "nowhere:start", {"plain": RuntimeSearch("quick"), "fused": RuntimeSearch("wide", ("beam",))}
    )

    def found(name: str, **options: Any) -> Any:
        return runtime_search(runtime, Named(name, options), registry)

    assert found("plain") == RuntimeOptions("quick", {})
    assert found("fused") == RuntimeOptions("wide", {"beam": 4}), "the decoder's default, not the runtime's"
    assert found("fused", beam=7) == RuntimeOptions("wide", {"beam": 7})
    assert found("fused", beam=7, lm_weight=0.0) == RuntimeOptions("wide", {"beam": 7})
    assert found("fused", lm_weight=0.3) == "the wide of box has no lm_weight, here 0.3"
    assert found("other") == "box has no search other"
    assert default_search(runtime) == RuntimeOptions("quick")


BOX = """
def start():
    def load(spec):
        return lambda samples_S, rate: {"text": str(spec["num_bins"]), "tokens": [], "times_s": []}
    return "box 1.0", load
"""


def test_a_runtime_may_load_files_of_any_kind(tmp_path: Path) -> None:
    (tmp_path / "box.py").write_text(BOX)
    (tmp_path / "model.bin").write_bytes(b"weights")
    runtime = Runtime("box", f"{tmp_path / 'box.py'}:start", {"plain": RuntimeSearch("quick")})
    utterances = [Utterance("a", np.zeros(1600, np.float32))]
    measured = measure_files(runtime, {"model": tmp_path / "model.bin"}, utterances)
    assert measured.texts == {"a": "None"}
    assert _num_params(tmp_path / "model.bin") is None


def test_an_int8_system_whose_exporter_has_no_int8_files_keeps_its_row() -> None:
    class Fp32Only:
        head = "ctc"
        variants = {"fp32": Variant(Bounds(), "")}
        ships = staticmethod(lambda number_formats: next(iter(number_formats)))
        runtime = Runtime("box", "nowhere:start", {"plain": RuntimeSearch("quick")})
        files = {"fp32": {"model": "m"}}

        class Config(Options):
            """None."""

    registry = Registry()
    registry.add("exporters", "boxed", Fp32Only, "here")
    recipe: Any = SimpleNamespace(plugins=SimpleNamespace(registry=registry), export=[Named("boxed")])
    meta = {"model": {"name": "x", "heads": {"ctc": {}}}}
    bundle: Any = SimpleNamespace(number_formats={"int8"}, name="kd", meta=meta)
    said = {"test": [{"id": "a", "hyp": "x"}]}
    row = row_of(recipe, bundle, Path("exports"), ("greedy", Named("plain")), {}, said, list)
    assert row.hypotheses is said
    assert row.costs["runtime"] == "not measured: boxed writes no int8 files"
    assert row.costs["size_mb"] is None


class Model(nn.Module):
    def forward(self, features_BTF: torch.Tensor, lens_B: torch.Tensor) -> ModelOutput:
        assert features_BTF.shape[0] == 1
        assert torch.get_num_threads() == 1
        return ModelOutput(features_BTF, lens_B)


class Sleeps:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        self.calls += 1
        time.sleep(self.seconds)
        return [Hypothesis("")]


def test_the_time_of_a_search() -> None:
    features = {"name": "fbank", "num_mel_bins": 80}
    sound = [Utterance(str(i), np.zeros(8000, np.float32)) for i in range(5)]
    quick, slow = Sleeps(0.0), Sleeps(0.05)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rtf = [search_rtf(Model(), search, features, sound) for search in (quick, slow)]  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert quick.calls == slow.calls == 8, "three to warm up"
    assert rtf[1] >= 0.1, "0.05 s of sleep per half second of audio"
    assert 0 < rtf[0] < rtf[1]
    with pytest.raises(KdrecipeError, match="no utterance"):
        search_rtf(Model(), quick, features, [])  # type: ignore[arg-type]


# ---------------------------------------------------------------- stage 9


def test_what_is_compared_with_what() -> None:
    other = {"decoder": "ctc_beam", "options": {"beam": 4, "lm_weight": 0.0}, "lm": False}
    facts = {"greedy": GREEDY, "beam": BEAM, "narrow": other, "lm": BEAM_LM}
    assert pairs(facts) == [("beam", "greedy"), ("narrow", "greedy"), ("lm", "greedy"), ("lm", "beam")]
    assert pairs({"beam": BEAM, "lm": BEAM_LM}) == [("lm", "beam")], "once"
    assert pairs({"lm": BEAM_LM, "beam": BEAM}) == [("beam", "lm")]
    assert pairs({"greedy": GREEDY}) == []


def say(path: Path, wrong: set[int], num_utterances: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"u{i:02}", "ref": "one two three", "hyp": "one two" if i in wrong else "one two three"}
        for i in range(num_utterances)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scored(tmp_path: Path) -> list[dict[str, Any]]:
    """Two systems of two seeds: the language model helps ``kd`` much, the beam by chance at most."""
    wrong = {"greedy": set(range(20)), "beam": set(range(19)), "lm": set(range(4))}
    hyps = {
        system: {
            label: {seed: {"test": say(tmp_path / system / label / str(seed), bad)} for seed in (1, 2)}
            for label, bad in wrong.items()
        }
        for system in ("teacher", "kd")
    }
    hyps["kd"]["lm"][2] = {"test": say(tmp_path / "kd/lm/2", set(range(22)) - {0, 1})}
    hyps["alone"] = {"greedy": hyps["kd"]["greedy"]}
    facts = {system: {"greedy": GREEDY, "beam": BEAM, "lm": BEAM_LM} for system in ("teacher", "kd")}
    return score_searches(hyps, {**facts, "alone": {"greedy": GREEDY}}, METRICS)


def test_searches_are_scored_like_systems(scored: list[dict[str, Any]]) -> None:
    rows = {(row["system"], row["search"]): row for row in scored}
    assert list(rows) == [(s, x) for s in ("teacher", "kd") for x in ("greedy", "beam", "lm")]
    greedy, lm = rows["teacher", "greedy"], rows["teacher", "lm"]
    assert greedy["splits"]["test"]["wer"]["mean"] == pytest.approx(20 / 120, abs=1e-6)
    assert greedy["splits"]["test"]["del"] == pytest.approx(20 / 120, abs=1e-6)
    assert greedy["comparisons"] == []
    first, plain = lm["comparisons"]
    assert (first["a"], first["b"], first["split"]) == ("lm", "greedy", "test")
    assert (plain["a"], plain["b"]) == ("lm", "beam")
    assert first["difference"] == pytest.approx(-16 / 120, abs=1e-6)
    assert first["p"] < first["p_adjusted"] < 0.05, "all comparisons of searches are one family"
    assert first["seeds_won"] == [2, 0, 2]
    assert rows["kd", "lm"]["comparisons"][0]["seeds_won"] == [1, 0, 2], "of the same seed"
    assert not any("seed_pairs" in c for row in scored for c in row["comparisons"])
    assert rows["teacher", "beam"]["comparisons"][0]["p_adjusted"] > 0.05


def test_nothing_to_compare() -> None:
    assert score_searches({"kd": {"greedy": {}}}, {"kd": {"greedy": GREEDY}}, METRICS) == []


# ---------------------------------------------------------------- stage 10


def results(scored: list[dict[str, Any]]) -> dict[str, Any]:
    rtf = {"greedy": 0.01, "beam": 0.012, "lm": 0.05}
    facts = {"greedy": GREEDY, "beam": BEAM, "lm": BEAM_LM}
    rows = [{**row, **facts[row["search"]], "rtf": rtf[row["search"]]} for row in scored]
    return {"systems": [], "comparisons": [], "splits": {}, "searches": rows}


def test_the_reading_says_only_what_was_shown(scored: list[dict[str, Any]]) -> None:
    said = reading(results(scored))
    assert [item["verdict"] for item in said] == ["better", "better"]
    first, second = (item["text"] for item in said)
    assert first.startswith(
        "**Search by lm is better than by greedy** on test: teacher 16.67 → 3.33 % WER, p "
    )
    assert "; kd 16.67 → 10.00 % WER, p " in first
    assert "in 1 of 2 seeds" in first
    assert first.endswith(" It takes 5.0 times as long in torch.")
    assert second.startswith("**Search by lm is better than by beam** on test: ")
    assert not any("beam is" in item["text"] for item in said)


def test_a_worse_search_is_called_so(scored: list[dict[str, Any]]) -> None:
    rows = [row for row in results(scored)["searches"] if row["system"] == "teacher"]
    for row in rows:
        row["comparisons"] = [
            {**c, "difference": -c["difference"], "seeds_won": [0, 2, 2]} for c in row["comparisons"]
        ]
    found = reading({"systems": [], "comparisons": [], "splits": {}, "searches": rows})
    assert {item["verdict"] for item in found} == {"worse"}
    assert "Search by lm is worse than by greedy" in found[0]["text"]
    assert "seeds" not in found[0]["text"], "all agree"


def test_the_table(scored: list[dict[str, Any]]) -> None:
    table = search_table(results(scored), "test", timed=True)
    rows = {(row[0], row[1]): dict(zip(table.headers, row, strict=True)) for row in table.rows}
    assert rows["teacher", "greedy"]["points to the first"] == "–"
    assert rows["teacher", "lm"]["points to the first"] == "−13.33"
    assert rows["kd", "lm"]["RTF (torch, 1 thread)"] == "0.0500"
    assert rows["kd", "beam"]["WER %"].startswith("15.83")
    untimed = search_table(results(scored), "test", timed=False)
    assert all("RTF" not in header for header in untimed.headers)


@pytest.mark.parametrize(
    ("decoder", "options", "exporter"),
    [
        ("attention_greedy", {}, "sherpa_attention"),
        ("attention_beam", {"ctc_weight": 0.3}, "onnx_attention"),
        ("attention_beam", {"lm_weight": 0.3}, "sherpa_attention"),  # no runtime has it: the first
    ],
)
def test_the_files_that_are_measured_are_those_whose_runtime_has_the_rows_search(decoder, options, exporter):
    exporters = [Named(name) for name in ("onnx_ctc", "sherpa_attention", "onnx_attention")]
    registry = load_plugins().registry
    found = measured_exporter(["attention", "ctc"], exporters, registry, Named(decoder, options))
    assert found == Named(exporter)
    assert measured_exporter(["attention"], exporters, registry) == Named("sherpa_attention")
    assert measured_exporter(["rnnt"], exporters, registry) is None
