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
from kdrecipe.recipe.load import load_recipe
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.score.scoring import Question, score, score_split
from kdrecipe.stages.score import _speakers, families
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
    found = score(hyps, METRICS, Question())["splits"]["test"]
    row = found["systems"]["kd"]
    said = {seed: list(say(0.2, seed).values()) for seed in (1, 2, 3)}
    rates = [jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]) for pairs in said.values()]
    assert row["wer"]["mean"] == pytest.approx(np.mean(rates), abs=1e-6)
    assert row["wer"]["std"] == pytest.approx(np.std(rates, ddof=1), abs=1e-6)
    assert row["sub"] + row["ins"] + row["del"] == pytest.approx(row["wer"]["mean"], abs=3e-6)
    lo, hi = row["wer"]["ci95"]
    assert lo < row["wer"]["mean"] < hi
    assert found["utterances"] == 60
    assert score(hyps, METRICS, Question())["splits"]["test"] == found  # deterministic


def test_one_seed_has_no_std() -> None:
    row = score_split({"kd": {7: say(0.2, 7)}}, METRICS, Question())["systems"]["kd"]
    assert row["wer"]["std"] is None
    assert row["wer"]["seeds"].keys() == {"7"}
    assert "gap_recovered" not in row


def test_more_seeds_do_not_pretend_to_be_more_utterances() -> None:
    one = score_split({"kd": {1: say(0.2, 1)}}, METRICS, Question())
    same = score_split({"kd": {s: say(0.2, 1) for s in (1, 2, 3)}}, METRICS, Question())
    assert one["systems"]["kd"]["wer"]["ci95"] == same["systems"]["kd"]["wer"]["ci95"]


def test_comparisons() -> None:
    texts = {
        "kd": {s: say(0.1, s) for s in (1, 2)},
        "scratch": {s: say(0.4, 10 + s) for s in (1, 2)},
        "twin": {s: say(0.1, s) for s in (1, 2)},
    }
    question = Question(compare=[("kd", "scratch"), ("scratch", "kd"), ("kd", "twin"), ("kd", "absent")])
    better, worse, equal = score_split(texts, METRICS, question)["comparisons"]
    assert better["p"] < 0.001
    assert better["p"] <= better["p_adjusted"] <= 3 * better["p"]
    assert better["difference"] < 0 > better["ci95"][1]
    assert better["seed_pairs"] == [4, 0, 4]
    assert worse["p"] == better["p"]
    assert worse["difference"] == -better["difference"]
    assert worse["ci95"] == [-better["ci95"][1], -better["ci95"][0]]
    assert equal["p"] == 1.0
    assert equal["difference"] == 0
    assert equal["ci95"] == [0, 0]


def test_seeds_of_one_family_are_paired() -> None:
    """An int8 copy a bit worse than each of its three parents, which lie far apart."""
    rates = {1: 0.1, 2: 0.3, 3: 0.5}
    parents = {seed: say(rate, seed, 200) for seed, rate in rates.items()}
    copies = {
        seed: {u: (r, "oh" if int(u[3:]) % 20 == seed else h) for u, (r, h) in said.items()}
        for seed, said in parents.items()
    }
    texts = {"kd": parents, "kd_int8": copies}
    families = {"kd": "kd", "kd_int8": "kd"}
    [paired] = score_split(texts, METRICS, Question(compare=[("kd_int8", "kd")], families=families))[
        "comparisons"
    ]
    [crossed] = score_split(texts, METRICS, Question(compare=[("kd_int8", "kd")]))["comparisons"]
    assert paired["difference"] == crossed["difference"] > 0
    assert paired["p"] < 0.05 < crossed["p"]
    assert paired["seeds_won"] == [0, 3, 3]
    assert "seed_pairs" not in paired
    assert crossed["seed_pairs"][2] == 9
    assert "seeds_won" not in crossed


def test_one_seed_against_three_is_no_crossing() -> None:
    texts = {"kd": {s: say(0.2, s) for s in (1, 2, 3)}, "teacher": {1: say(0.1, 9)}}
    [found] = score_split(texts, METRICS, Question(compare=[("kd", "teacher")]))["comparisons"]
    assert found["seeds_won"] == [0, 3, 3]


def test_seeds_far_apart_show_nothing() -> None:
    """99 utterances and three seeds from 52 to 80 % errors against three near 85 %."""
    texts = {
        "kd": {s: say(rate, s, 99) for s, rate in ((1, 0.52), (2, 0.66), (3, 0.8))},
        "scratch": {s: say(0.85, 10 + s, 99) for s in (1, 2, 3)},
    }
    speakers = {u: f"spk{i % 8}" for i, u in enumerate(texts["kd"][1])}
    question = Question(compare=[("kd", "scratch")])
    [found] = score_split(texts, METRICS, question, speakers=speakers)["comparisons"]
    assert found["p"] > 0.05
    assert found["ci95"][0] < 0 < found["ci95"][1]
    single = {name: {1: seeds[2]} for name, seeds in texts.items()}
    [found] = score_split(single, METRICS, question, speakers=speakers)["comparisons"]
    assert found["p"] < 0.001, "of one seed each: what seeds vary is left out"


def test_gap_and_fidelity() -> None:
    teacher, scratch = say(0.02, 1), say(0.5, 2)
    texts = {"teacher": {1: teacher}, "scratch": {1: scratch}, "kd": {1: say(0.2, 3)}, "parrot": {1: teacher}}
    question = Question(
        teachers={"kd": "teacher", "parrot": "teacher", "scratch": "absent"},
        baselines={"kd": "scratch", "parrot": "scratch"},
    )
    rows = score_split(texts, METRICS, question)["systems"]
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
    rows = score_split(texts, METRICS, question)["systems"]
    assert rows["kd"]["gap_recovered"] is None
    near = {"teacher": {1: say(0.3, 1)}, "scratch": {1: say(0.31, 5)}, "kd": {1: say(0.3, 3)}}
    gap = score_split(near, METRICS, question)["systems"]["kd"]["gap_recovered"]
    assert gap is None or gap["ci95"] is None


def test_speakers() -> None:
    said = say(0.2, 1)
    speakers = {u: f"spk{i % 6}" for i, u in enumerate(said)}
    found = score_split({"kd": {1: said}}, METRICS, Question(), speakers=speakers)
    assert (found["speakers"], found["units"], found["notes"]) == (6, "speakers", [])
    alone = score_split({"kd": {1: said}}, METRICS, Question())
    assert found["systems"]["kd"]["wer"]["ci95"] != alone["systems"]["kd"]["wer"]["ci95"]
    assert (alone["speakers"], alone["units"]) == (None, "utterances")
    assert "test does not name every speaker: " in alone["notes"][0]
    del speakers["utt000"]  # one unknown: utterances in place of a wrong division
    assert score_split({"kd": {1: said}}, METRICS, Question(), speakers=speakers) == alone


def test_too_few_speakers_fall_back_to_utterances() -> None:
    said = say(0.2, 1)
    alone = score_split({"kd": {1: said}}, METRICS, Question())["systems"]
    for number, words in ((1, "one speaker only"), (2, "2 speakers only")):
        speakers = {u: f"spk{i % number}" for i, u in enumerate(said)}
        found = score_split({"kd": {1: said}}, METRICS, Question(), speakers=speakers)
        assert (found["speakers"], found["units"]) == (number, "utterances")
        assert words in found["notes"][0]
        assert found["systems"] == alone
    each = {u: u for u in said}
    found = score_split({"kd": {1: said}}, METRICS, Question(), speakers=each)
    assert (found["units"], found["notes"], found["systems"]) == ("speakers", [], alone)


def test_speakers_come_with_the_hypotheses(tmp_path: Path) -> None:
    rows = [{"id": "a", "speaker": "anna"}, {"id": "b", "speaker": None}, {"id": "c", "speaker": "carl"}]
    path = tmp_path / "test.jsonl"
    rows[1]["ref"] = "RED\u2028SUN\u0085"  # lines end at \n only
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert _speakers({"kd": {1: {"test": path}}}) == {"a": "anna", "c": "carl"}


def test_who_is_paired_over_seeds() -> None:
    """Compressed systems with their parents; students with a teacher of as many seeds, not of one."""
    file = Path(__file__).parents[2] / "recipes/an4/ctc_kd/recipe.yaml"
    found = families(load_recipe(file, overrides=["systems.teacher.train.seeds=[1]"]))
    assert found["kd_int8"] == found["kd_pruned_int8"] == found["kd_unlabelled"]
    assert len({found[name] for name in ("teacher", "scratch", "kd", "kd_unlabelled", "kd_full")}) == 5
    found = families(load_recipe(file, overrides=["systems.teacher.train.seeds=[1, 2, 3]"]))
    assert len({found[name] for name in ("teacher", "kd", "kd_unlabelled", "kd_full", "kd_int8")}) == 1
    assert found["scratch"] != found["kd"]


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
