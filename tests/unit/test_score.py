"""Error rates, intervals and tests: agreement with jiwer, and with statistics where they are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError
from kdrecipe.interfaces import Metric
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.score.resampling import holm, interval, resampled_sums, sign_flip_p
from kdrecipe.score.scoring import Question, score, score_split
from kdrecipe_plugins.metrics.cer import Cer
from kdrecipe_plugins.metrics.wer import TextOptions, Wer

METRICS: dict[str, Metric] = {"wer": Wer(TextOptions()), "cer": Cer(TextOptions())}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Texts = dict[str, tuple[str, str]]


def say(error_rate: float, seed: int, num_utterances: int = 60, reference_seed: int = 0) -> Texts:
    """Hypotheses that get each word wrong with probability ``error_rate``; half of those are deleted."""
    references, noise = random.Random(reference_seed), random.Random(seed + 1000)
    said = {}
    for i in range(num_utterances):
        words = [references.choice(WORDS) for _ in range(references.randint(3, 9))]
        heard = [w if noise.random() >= error_rate else noise.choice(["", "oh"]) for w in words]
        said[f"utt{i:03}"] = (" ".join(words), " ".join(w for w in heard if w))
    return said


def test_metrics_agree_with_jiwer() -> None:
    said = list(say(0.3, 1).values())
    references, hypotheses = [r for r, _ in said], [h for _, h in said]
    for metric, theirs in ((METRICS["wer"], jiwer.wer), (METRICS["cer"], jiwer.cer)):
        errors, length = np.array([metric.errors(r, h) for r, h in said]).sum(axis=0)
        assert errors / length == pytest.approx(theirs(references, hypotheses))


@given(st.lists(st.sampled_from(WORDS)), st.lists(st.sampled_from(WORDS)))
@settings(max_examples=50, deadline=None)
def test_details_add_up(reference: list[str], hypothesis: list[str]) -> None:
    for name in ("wer", "cer"):
        metric = METRICS[name]
        edits = metric.details(" ".join(reference), " ".join(hypothesis))  # type: ignore[attr-defined]
        assert metric.errors(" ".join(reference), " ".join(hypothesis)) == (
            edits["sub"] + edits["ins"] + edits["del"],
            edits["length"],
        )
    words = METRICS["wer"].details(" ".join(reference), " ".join(hypothesis))  # type: ignore[attr-defined]
    assert words["length"] == len(reference)
    assert words["ins"] - words["del"] == len(hypothesis) - len(reference)


def test_empty_reference_counts_insertions() -> None:
    assert METRICS["wer"].errors("", "one two") == (2, 0)
    assert METRICS["wer"].errors("one two", "") == (2, 2)


def test_normalisation() -> None:
    plain = Wer(TextOptions())
    assert plain.errors("café  one", "cafe\u0301 one ") == (0, 2)
    assert plain.errors("One, two.", "one two")[0] == 2
    loose = Wer(TextOptions(lowercase=True, remove_punctuation=True))
    assert loose.errors("One, two.", "one two") == (0, 2)
    assert loose.errors("don't 'quote'", "don’t quote") == (0, 2)


def test_rates_over_seeds_and_splits(tmp_path: Path) -> None:
    hyps: dict[str, dict[int, dict[str, Path]]] = {}
    for seed in (1, 2, 3):
        path = tmp_path / f"kd{seed}.jsonl"
        rows = [{"id": u, "ref": r, "hyp": h} for u, (r, h) in say(0.2, seed).items()]
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        hyps.setdefault("kd", {})[seed] = {"test": path}
    found = score(hyps, METRICS, Question(), resamples=500)["splits"]["test"]
    row = found["systems"]["kd"]
    said = {seed: list(say(0.2, seed).values()) for seed in (1, 2, 3)}
    rates = [jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]) for pairs in said.values()]
    assert row["wer"]["mean"] == pytest.approx(np.mean(rates), abs=1e-6)
    assert row["wer"]["std"] == pytest.approx(np.std(rates, ddof=1), abs=1e-6)
    assert row["sub"] + row["ins"] + row["del"] == pytest.approx(row["wer"]["mean"], abs=3e-6)
    lo, hi = row["wer"]["ci95"]
    assert lo < row["wer"]["mean"] < hi
    assert found["utterances"] == 60
    assert score(hyps, METRICS, Question(), resamples=500)["splits"]["test"] == found  # deterministic


def test_one_seed_has_no_std() -> None:
    row = score_split({"kd": {7: say(0.2, 7)}}, METRICS, Question(), resamples=100)["systems"]["kd"]
    assert row["wer"]["std"] is None
    assert row["wer"]["seeds"].keys() == {"7"}
    assert "gap_recovered" not in row


def test_more_seeds_do_not_pretend_to_be_more_utterances() -> None:
    one = score_split({"kd": {1: say(0.2, 1)}}, METRICS, Question(), resamples=2000)
    same = score_split({"kd": {s: say(0.2, 1) for s in (1, 2, 3)}}, METRICS, Question(), resamples=2000)
    assert one["systems"]["kd"]["wer"]["ci95"] == same["systems"]["kd"]["wer"]["ci95"]


def test_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    truth, covered, trials = 0.3, 0, 200
    for trial in range(trials):
        lengths = rng.integers(3, 15, size=80).astype(float)
        errors = rng.binomial(lengths.astype(int), truth).astype(float)
        sums = resampled_sums({"e": errors, "n": lengths}, resamples=400, seed=trial)
        found = interval(sums["e"] / sums["n"])
        assert found is not None
        covered += found[0] <= truth <= found[1]
    assert 0.89 <= covered / trials <= 0.99


def test_bootstrap_by_group_is_wider_where_groups_differ() -> None:
    rng = np.random.default_rng(0)
    speakers = [f"s{i // 20}" for i in range(200)]
    rates = np.repeat(rng.uniform(0.05, 0.6, size=10), 20)
    errors, lengths = rng.binomial(10, rates).astype(float), np.full(200, 10.0)
    widths = []
    for groups in (None, speakers):
        sums = resampled_sums({"e": errors, "n": lengths}, groups=groups, resamples=2000)
        assert sums["n"].mean() == pytest.approx(2000)
        lo, hi = interval(sums["e"] / sums["n"]) or [0, 0]
        widths.append(hi - lo)
    assert widths[1] > 2 * widths[0]


def test_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    column = {"e": np.arange(50.0)}
    whole = resampled_sums(column, resamples=300, seed=3)["e"]
    monkeypatch.setattr("kdrecipe.score.resampling._CHUNK_CELLS", 50 * 7)
    parts = resampled_sums(column, resamples=300, seed=3)["e"]
    assert np.array_equal(whole, parts)


def test_sign_flips() -> None:
    rng = np.random.default_rng(1)
    same = rng.integers(0, 4, size=300).astype(float)
    assert sign_flip_p(same - same) == 1.0
    clearly = rng.binomial(1, 0.5, size=300).astype(float)
    assert sign_flip_p(clearly, resamples=2000) == pytest.approx(1 / 2001)
    mixed = rng.normal(0.1, 1.0, size=300)
    assert sign_flip_p(mixed) == sign_flip_p(-mixed)
    assert sign_flip_p(np.array([1.0]), resamples=1000) == 1.0  # one utterance proves nothing


def test_sign_flip_p_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    p_values = [sign_flip_p(rng.normal(size=60), resamples=300, seed=i) for i in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(p_values) <= 0.6


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_comparisons() -> None:
    texts = {
        "kd": {s: say(0.1, s) for s in (1, 2)},
        "scratch": {s: say(0.4, 10 + s) for s in (1, 2)},
        "twin": {s: say(0.1, s) for s in (1, 2)},
    }
    question = Question(compare=[("kd", "scratch"), ("scratch", "kd"), ("kd", "twin"), ("kd", "absent")])
    better, worse, equal = score_split(texts, METRICS, question, resamples=2000)["comparisons"]
    assert better["p"] < 0.001
    assert better["p"] <= better["p_adjusted"] <= 3 * better["p"]
    assert better["difference"] < 0 > better["ci95"][1]
    assert better["seed_pairs"] == [4, 4]
    assert worse["p"] == better["p"]
    assert worse["difference"] == -better["difference"]
    assert worse["ci95"] == [-better["ci95"][1], -better["ci95"][0]]
    assert equal["p"] == 1.0
    assert equal["difference"] == 0
    assert equal["ci95"] == [0, 0]


def test_gap_and_fidelity() -> None:
    teacher, scratch = say(0.02, 1), say(0.5, 2)
    texts = {"teacher": {1: teacher}, "scratch": {1: scratch}, "kd": {1: say(0.2, 3)}, "parrot": {1: teacher}}
    question = Question(
        teachers={"kd": "teacher", "parrot": "teacher", "scratch": "absent"},
        baselines={"kd": "scratch", "parrot": "scratch"},
    )
    rows = score_split(texts, METRICS, question, resamples=1000)["systems"]
    wer = {name: row["wer"]["mean"] for name, row in rows.items()}
    gap = rows["kd"]["gap_recovered"]
    assert gap["mean"] == pytest.approx(
        (wer["scratch"] - wer["kd"]) / (wer["scratch"] - wer["teacher"]), abs=1e-5
    )
    assert gap["ci95"][0] < gap["mean"] < gap["ci95"][1]
    assert rows["parrot"]["gap_recovered"]["mean"] == 1
    assert rows["parrot"]["gap_recovered"]["ci95"] == [1, 1]
    assert rows["parrot"]["fidelity"]["wer"] == 0
    assert rows["parrot"]["fidelity"]["agreement"] == 1
    expected = jiwer.wer([teacher[u][1] for u in teacher], [texts["kd"][1][u][1] for u in teacher])
    assert rows["kd"]["fidelity"]["wer"] == pytest.approx(expected, abs=1e-6)
    assert "fidelity" not in rows["scratch"]


def test_no_gap_to_recover() -> None:
    texts = {"teacher": {1: say(0.5, 1)}, "scratch": {1: say(0.1, 2)}, "kd": {1: say(0.1, 3)}}
    question = Question(teachers={"kd": "teacher"}, baselines={"kd": "scratch"})
    rows = score_split(texts, METRICS, question, resamples=200)["systems"]
    assert rows["kd"]["gap_recovered"] is None
    near = {"teacher": {1: say(0.3, 1)}, "scratch": {1: say(0.31, 5)}, "kd": {1: say(0.3, 3)}}
    gap = score_split(near, METRICS, question, resamples=500)["systems"]["kd"]["gap_recovered"]
    assert gap is None or gap["ci95"] is None


def test_speakers() -> None:
    said = say(0.2, 1)
    speakers = {u: f"spk{i % 6}" for i, u in enumerate(said)}
    found = score_split({"kd": {1: said}}, METRICS, Question(), speakers=speakers, resamples=300)
    assert found["speakers"] == 6
    assert len(found["systems"]["kd"]["wer"]["ci95_speakers"]) == 2
    assert "6 speakers only" in found["notes"][0]
    del speakers["utt000"]  # one unknown: no interval over speakers, rather than a wrong one
    found = score_split({"kd": {1: said}}, METRICS, Question(), speakers=speakers, resamples=300)
    assert found["speakers"] is None


def test_systems_must_share_utterances() -> None:
    short = dict(list(say(0.1, 2).items())[:-2])
    with pytest.raises(DataError, match="kd, seed 2, test: lacks 2 utterances"):
        score_split({"teacher": {1: say(0.1, 1)}, "kd": {2: short}}, METRICS, Question())
    other = say(0.1, 2) | {"utt000": ("other words", "")}
    with pytest.raises(DataError, match="other references for 1 utterances"):
        score_split({"teacher": {1: say(0.1, 1)}, "kd": {2: other}}, METRICS, Question())


def test_all_references_empty() -> None:
    with pytest.raises(DataError, match="all empty"):
        score_split({"kd": {1: {"a": ("", "one")}}}, METRICS, Question())


def test_broken_hypotheses_files(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    with pytest.raises(DataError, match="missing"):
        read_hypotheses(path)
    path.write_text("")
    with pytest.raises(DataError, match="no hypotheses"):
        read_hypotheses(path)
    good = json.dumps({"id": "a", "ref": "one", "hyp": "one"})
    path.write_text(f"{good}\n{{broken\n[]\n{good}\n")
    with pytest.raises(DataError) as error:
        read_hypotheses(path)
    assert [p.where.rsplit(":")[-1] for p in error.value.problems] == ["2", "3", "4"]
