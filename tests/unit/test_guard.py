"""A teacher that is not clearly better than a quick baseline is called out, early and in the report."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.errors import DataError
from kdrecipe.recipe.load import load_recipe
from kdrecipe.report import guard as said
from kdrecipe.report.write import assemble
from kdrecipe.score.guard import compare
from kdrecipe.stages import guard
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.stages.run import run_recipe
from kdrecipe.testing.corpus import make_corpus

# ---------------------------------------------------------------- the rule


def texts(error_rate: float, number: int = 60, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Utterances of 20 letters, of which about so many are missing."""
    rng, found = random.Random(seed), {}
    for i in range(number):
        reference = "".join(random.Random(i).choices("ABCDE", k=20))
        found[f"u{i:03}"] = reference, "".join(x for x in reference if rng.random() >= error_rate)
    return found


def test_clearly_fewer_errors_are_learning():
    found = compare(texts(0.06), texts(0.3, seed=1))
    assert found["learnt"] is True
    assert found["cer"] == pytest.approx(0.06, abs=0.02)
    assert found["baseline_cer"] == pytest.approx(0.3, abs=0.03)
    assert found["ci95"][1] < 0
    assert found["p"] < 0.001
    assert (found["utterances"], found["units"]) == (60, "utterances")


def test_more_errors_equal_ones_and_a_little_fewer_are_not():
    for teacher, baseline in ((0.84, 0.61), (0.6, 0.6), (1.0, 1.0)):
        assert compare(texts(teacher), texts(baseline, seed=1))["learnt"] is False
    little = compare(texts(0.57, 2000), texts(0.6, 2000, seed=1))
    assert little["p"] < 0.05, "beyond chance, but by a twentieth only"
    assert little["learnt"] is False


def test_a_teacher_on_the_plateau_has_not_learnt_whatever_the_baseline():
    assert compare(texts(0.84), texts(1.0))["learnt"] is False
    assert compare(texts(0.7), texts(1.0))["learnt"] is True


def test_a_difference_that_chance_explains_is_not():
    right, wrong = ("ABCDE", "ABCDE"), ("ABCDE", "")
    found = compare(
        {"a": right, "b": wrong, "c": right, "d": wrong}, {"a": wrong, "b": wrong, "c": wrong, "d": right}
    )
    assert (found["cer"], found["baseline_cer"]) == (0.5, 0.75)
    assert found["p"] > 0.05
    assert found["learnt"] is False


def test_on_an_easy_task_both_learn():
    assert compare(texts(0.01), texts(0.01, seed=1))["learnt"] is True
    assert compare(texts(0.0), texts(0.0))["learnt"] is True


def test_speakers_are_the_units_where_there_are_enough():
    speakers = {f"u{i:03}": f"s{i % 5}" for i in range(60)}
    assert compare(texts(0.06), texts(0.3), speakers)["units"] == "speakers"


def test_other_utterances_can_not_be_compared():
    with pytest.raises(DataError):
        compare(texts(0.1), texts(0.1, 59))


def test_the_baseline_is_quick_and_never_takes_longer_than_the_teacher():
    assert guard.num_steps(100_000) == guard.MAX_STEPS
    assert guard.num_steps(10_000) == 1000
    assert guard.num_steps(1000) == guard.MIN_STEPS
    assert guard.num_steps(100) == 100
    assert guard.num_steps(None) == guard.MIN_STEPS


# ---------------------------------------------------------------- what is said


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "system": "teacher",
        "seed": 1,
        "kind": "trained",
        "learnt": False,
        "cer": 0.842,
        "baseline_steps": 240,
    }
    rest = {
        "baseline_cer": 0.613,
        "curve": [(1, 1.0), (2, 0.95), (3, 0.912)],
        "max_epochs": 3,
        "stopped": "bound",
    }
    return {**base, **rest, **changes}


def test_a_line_for_every_verdict():
    rates = "84.2 % of dev's characters wrong, a quick baseline of 240 steps 61.3 %"
    longer = "train it longer (training.epochs, now 3), or with another training.lr or smaller batches"
    assert ": ".join(said.verdict(row())) == (
        f"teacher/seed1 has learnt little: {rates}; dev token errors by epoch: 100 95 91 %; "
        f"{longer} (training.batch_duration_s)"
    )
    assert said.verdict(row(learnt=True)) == ("teacher/seed1", rates)
    assert said.verdict(row(learnt=None, why="too tiny")) == (
        "teacher/seed1",
        f"{rates} (no verdict: too tiny)",
    )
    assert said.verdict(row(cer=0.3))[0] == "teacher/seed1 is not clearly better than a quick baseline"
    assert "its dev error was flat: try another training.lr" in said.verdict(row(stopped="flat"))[1]
    imported = said.verdict(row(kind="pretrained", curve=[], stopped=None))[1]
    assert imported == f"{rates}; is it meant for this language and this audio?"


def test_a_long_curve_is_thinned():
    text = said.curve([(epoch, 1 / epoch) for epoch in range(1, 101)])
    assert (
        text
        == "dev token errors after epochs 1, 12, 23, 34, 45, 56, 67, 78, 89, 100: 100 8 4 3 2 2 1 1 1 1 %"
    )


def test_it_is_the_first_that_the_report_says():
    trained = {"by_seed": [{"stopped": "bound"}, {"stopped": "flat"}]}
    systems = [
        {"name": "teacher", "seeds": [1, 2], "train": trained},
        {"name": "scratch", "seeds": [1], "train": {"by_seed": [{"stopped": "bound"}]}},
        {"name": "kd", "seeds": [1], "train": {"by_seed": [{"stopped": "flat"}]}},
    ]
    compared = {"split": "test", "a": "kd", "b": "scratch", "a_mean": 0.2, "b_mean": 0.3, "difference": -0.1}
    data = {"recipe": {"name": "x"}, "systems": systems, "comparisons": [{**compared, "p": 0.01}]}
    results = assemble({**data, "guard": [row(learnt=True), row(seed=2)]})
    first, second, *others = results["reading"]
    assert first["text"].startswith("**teacher/seed2 has learnt little**: 84.2 % of dev's characters wrong")
    assert first["verdict"] == "caution"
    assert second["text"].startswith("**kd is better than scratch**")
    stopped = "**Stopped by training.epochs while still improving**: teacher (1 of 2 seeds) and scratch. "
    assert [r["text"] for r in others if "Stopped" in r["text"]] == [
        f"{stopped}More epochs may improve these rows."
    ]
    assert [r["seed"] for r in results["guard"]] == [1, 2]
    assert assemble(data)["reading"][0] == second, "without teachers there is nothing to say of them"


# ---------------------------------------------------------------- through the stages

RECIPE = """
corpus: {name: manifests, root: "${CORPUS_ROOT}", subsets: {few: {speakers: 2}}}
features: {num_mel_bins: 40}
tokens: {name: char, data: all}
seeds: [1]
training:
  {batch_duration_s: 5, lr: 0.004, precision: fp32, schedule: linear, spec_augment: null, warmup_steps: 10}
systems:
  teacher:
    train: {model: {name: conformer, num_layers: 1, dim: 48, heads: {ctc: {}}}, training: {epochs: 2}}
  kd:
    distill:
      data: few
      teachers: [teacher]
      model: {name: conformer, num_layers: 1, dim: 32, heads: {ctc: {}}}
      losses: [{name: ctc, weight: 0.5}, {name: kl}]
      training: {epochs: 1}
export: [{name: onnx_ctc}]
decode: {splits: [test], measure_max: 2}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""


@pytest.fixture(scope="module", autouse=True)
def _corpus(tmp_path_factory):
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), num_speakers=8, utterances_per_speaker=10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORPUS_ROOT", str(corpus))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A recipe, and stages 0 to 2 in ``work``."""
    directory = tmp_path_factory.mktemp("guard")
    (directory / "recipe.yaml").write_text(RECIPE)
    run_recipe(load_recipe(directory), 0, 2, work=directory / "work")
    return directory


def run(place: Path, first: int, last: int, capsys, *overrides: str, **options: Any) -> str:
    capsys.readouterr()
    recipe = load_recipe(place, overrides=overrides)
    run_recipe(recipe, first, last, work=place / "work", **options)
    return capsys.readouterr().out


def found(place: Path) -> dict[str, Any]:
    return read_json(place / "work" / "guard" / "teacher" / "guard.json")


GOOD = "systems.teacher.train.training.epochs=30"


def test_a_poor_teacher_is_called_out_again_and_again_and_first_in_the_report(place, capsys):
    out = run(place, 3, 3, capsys)
    [line] = [line.strip() for line in out.splitlines() if "learnt little" in line]
    assert line.startswith("teacher/seed1 has learnt little: ")
    assert "; dev token errors by epoch: " in line
    assert "train it longer (training.epochs, now 2)" in line
    [verdict] = found(place)["verdicts"]
    assert verdict["learnt"] is False
    assert verdict["cer"] > 0.8
    assert [epoch for epoch, _ in verdict["curve"]] == [1, 2]
    baseline = found(place)["baseline"]
    teacher = read_json(place / "work" / "systems" / "teacher" / "seed1" / "bundle.json")
    assert baseline["model"]["dim"] == 32, "the student's encoder"
    assert baseline["data"] is None, "the teacher's labels"
    assert baseline["steps"] <= teacher["training"]["steps"]
    assert not (place / "work" / "guard" / "teacher" / "train" / "checkpoints").exists()

    out = run(place, 4, 10, capsys)
    assert out.index(line) < out.index("stage 4"), "said again, before students are trained"
    results = read_json(place / "work" / "report" / "results.json")
    first = results["reading"][0]["text"]
    assert first == f"**{line.split(':')[0]}**:{line.split(':', 1)[1]}."
    assert results["guard"] == [verdict]
    report = (place / "work" / "report" / "RESULTS.md").read_text()
    assert report.split("## What the numbers say")[1].strip().splitlines()[0] == f"- {first}"
    page = (place / "work" / "report" / "report.html").read_text()
    assert "<strong>teacher/seed1 has learnt little</strong>" in page

    out = run(place, 0, 10, capsys)
    assert line in out, "even if all of it is up to date"
    assert "done in" not in out
    assert line not in run(place, 0, 2, capsys)


def test_students_do_not_depend_on_the_verdict(place):
    plan = build_plan(load_recipe(place), Layout(place / "work"))
    assert plan.jobs["guard/teacher"].stage == 3
    assert "guard/teacher" in plan.jobs["report"].needs
    others = [job.name for job in plan.jobs.values() if "guard/teacher" in job.needs]
    assert others == ["report"]


def test_tiny_gives_no_verdict_and_one_epoch(place, capsys, tmp_path):
    recipe = load_recipe(place, profile="tiny")
    run_recipe(recipe, 0, 3, work=tmp_path)
    out = capsys.readouterr().out
    assert "(no verdict: the profile tiny trains too little for one)" in out
    result = read_json(tmp_path / "guard" / "teacher" / "guard.json")
    assert result["baseline"]["epochs"] == 1
    assert result["verdicts"][0]["learnt"] is None


def test_without_dev_there_is_no_verdict(place, capsys, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(place / "work", work)
    (work / "features" / "dev.jsonl.gz").unlink()
    out = tmp_path / "out"
    guard.run(load_recipe(place), Layout(work), "teacher", out)
    assert "not compared with a quick baseline, since the corpus has no dev" in capsys.readouterr().out
    assert read_json(out / "guard.json")["verdicts"] == []


def test_no_job_without_a_teacher(place, tmp_path):
    text = RECIPE.split("  kd:")[0] + "export: [{name: onnx_ctc}]\ndecode: {splits: [test]}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    plan = build_plan(load_recipe(tmp_path), Layout(tmp_path / "work"))
    assert not [name for name in plan.jobs if name.startswith("guard")]


def test_a_verdict_that_is_out_of_date_is_not_repeated(place, capsys):
    run(place, 3, 3, capsys)
    recipe, layout = load_recipe(place, overrides=[GOOD]), Layout(place / "work")
    plan = build_plan(recipe, layout)
    path = layout.guard("teacher") / "guard.json"
    kept = path.read_text()
    write_json(path, {"verdicts": [row()]})
    assert list(guard.warnings(recipe, layout, plan, {"guard/teacher"})) == []
    assert list(guard.warnings(recipe, layout, plan, set())) == [], "its size is another"
    path.write_text(kept)


def test_a_good_teacher_passes_in_one_line_and_a_new_teacher_is_looked_at_anew(place, capsys):
    run(place, 3, 3, capsys)
    out = run(place, 3, 3, capsys, GOOD)
    assert "guard/teacher ... (teacher/seed1 will run)" in out
    [line] = [line.strip() for line in out.splitlines() if "dev's characters" in line]
    assert line.startswith("teacher/seed1: ")
    assert "a quick baseline of " in line
    [verdict] = found(place)["verdicts"]
    assert verdict["learnt"] is True
    assert verdict["cer"] < 0.5
    assert "guard" not in run(place, 3, 3, capsys, GOOD).replace("jobs up to date", "")
    assert "characters" not in run(place, 4, 4, capsys, GOOD), "a good one is not mentioned again"


def test_an_imported_teacher_with_other_tokens(place, capsys, tmp_path):
    """It hears for itself, in its own tokens; the labels are those of its student."""
    run(place, 3, 3, capsys, GOOD)
    text = RECIPE.replace("tokens: {name: char, data: all}", "tokens: {name: bpe, vocab_size: 40}")
    start, rest = text.split("  teacher:")
    rest = rest.split("\n", 2)[2].replace("{name: kl}", "{name: hidden_mse, layers: {encoder.0: encoder.0}}")
    bundle = place / "work" / "systems" / "teacher" / "seed1"
    (tmp_path / "recipe.yaml").write_text(f"{start}  teacher: {{pretrained: {{bundle: {bundle}}}}}\n{rest}")
    run_recipe(load_recipe(tmp_path), 0, 3, work=tmp_path / "work")
    out = capsys.readouterr().out
    assert "teacher/seed1: " in out
    result = found(tmp_path)
    [verdict] = result["verdicts"]
    assert verdict["learnt"] is True
    assert verdict["cer"] == found(place)["verdicts"][0]["cer"], "characters, whatever the tokens"
    assert verdict["curve"] == []
    assert result["baseline"]["data"] == "few"
