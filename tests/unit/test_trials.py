"""Trials of a system: what they become, what is wrong with them, and the table of their dev errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from kdrecipe.cli.main import main
from kdrecipe.errors import RecipeError
from kdrecipe.recipe.load import load_recipe
from kdrecipe.report.trials import best, markdown, to_change
from kdrecipe.stages.inputs import system_inputs

RECIPE = """corpus: {name: manifests, root: /data, subsets: {few: {speakers: 2}}}
tokens: {name: char}
seeds: [3, 4]
systems:
  teacher: {train: {model: {name: conformer, num_layers: 2, dim: 16, heads: {ctc: {}}}}}
  scratch:
    train: {model: &small {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}
    trials: [{training.lr: 2.0e-3}]
  kd:
    distill:
      teachers: [teacher]
      model: *small
      losses: [{name: ctc}, {name: kl, weight: 0.5}]
      seeds: [5, 6]
    trials:
      - {losses.kl.weight: 0.25, losses.kl.top_k: 3}
      - TRIAL
  kd_int8: {compress: {from: kd, steps: [{name: int8_dynamic}]}}
claims: [{text: as elsewhere, system: scratch, figure: wer, value: 5, split: test}]
"""
GOOD = "{training.epochs: 7}"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(trial: str = GOOD, text: str = RECIPE, **options):
        Path("recipe.yaml").write_text(text.replace("TRIAL", trial), encoding="utf-8")
        return load_recipe(tmp_path, **options)

    return load


def problems(load, *arguments, **options) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **options)
    return [str(problem) for problem in caught.value.problems]


def test_each_trial_is_the_system_with_other_options_and_one_seed(load):
    recipe = load(with_trials=True)
    names = ["teacher", "scratch", "kd", "kd_int8", "scratch-trial1", "kd-trial1", "kd-trial2"]
    assert sorted(recipe.systems) == sorted(names)
    kd, first, second = (recipe.systems[name] for name in ("kd", "kd-trial1", "kd-trial2"))
    assert [term.weight for term in first.terms] == [1.0, 0.25]
    assert (kd.terms[1].options["top_k"], first.terms[1].options["top_k"]) == (None, 3)
    assert (first.training.epochs, second.training.epochs) == (kd.training.epochs, 7)
    assert second.terms == kd.terms
    assert {system.seeds for system in (kd, first, second)} == {(5,)}
    assert recipe.systems["scratch-trial1"].seeds == (3,)
    assert recipe.decode.splits == ("dev",)
    assert recipe.command.endswith(" --trials")
    assert [(trial.of, trial.where) for trial in recipe.trials] == [
        ("scratch", "recipe.yaml:8"),
        ("kd", "recipe.yaml:16"),
        ("kd", "recipe.yaml:17"),
    ]


def test_without_the_option_a_recipe_is_what_it_is_without_trials(load):
    recipe = load()
    bare = load(
        text="".join(x for x in RECIPE.splitlines(True) if "trial" not in x.lower() and "top_k" not in x)
    )
    assert recipe.systems == bare.systems
    for name in recipe.systems:
        assert system_inputs(recipe, recipe.systems[name]) == system_inputs(bare, bare.systems[name])
    assert recipe.decode == bare.decode


def test_tiny_shrinks_what_trials_say(load):
    recipe = load("{training.epochs: 90}", profile="tiny", with_trials=True)
    assert recipe.systems["kd-trial2"].training.epochs == 2


def test_what_is_left_out_has_no_trials(load):
    for options in ({}, {"profile": "tiny"}):
        recipe = load(overrides=["systems.kd=null", "systems.kd_int8=null"], with_trials=True, **options)
        assert sorted(recipe.systems) == ["scratch", "scratch-trial1", "teacher"]


def test_an_override_reaches_the_trials(load):
    recipe = load(overrides=["systems.kd.distill.losses.ctc.weight=0.3"], with_trials=True)
    assert [recipe.systems[name].terms[0].weight for name in ("kd", "kd-trial1")] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        ("{data: few}", "systems.kd.trials[1].data: a trial can't change 'data'"),
        ("{model.dim: 8}", "systems.kd.trials[1].model.dim: a trial can't change 'model'"),
        ("{loses.kl.weight: 1}", "did you mean 'losses'?"),
        ("{}", "it must be a mapping of dotted keys"),
        ("kl", "write trials: [{losses.kl.weight: 1.0}"),
    ],
)
def test_shapes_that_are_no_trials_are_told_in_every_run(load, trial, expected):
    [found] = problems(load, trial)
    assert found.startswith("recipe.yaml:17: ")
    assert expected in found


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        ("{losses.lk.weight: 1}", "'kl' is number 1"),
        ("{losses.kl.wieght: 1}", "did you mean 'weight'?"),
        ("{losses.kl.weight: -1}", "should be greater than or equal to 0"),
        ("{training.epoch: 3}", "did you mean 'epochs'?"),
        ("{losses.kl.weight: 0.5}", "these options are the system's own"),
        ("{losses.kl.top_k: 3, losses.kl.weight: 0.25}", "the same as kd-trial1"),
    ],
)
def test_mistakes_within_are_told_with_the_line_of_the_trial(load, trial, expected):
    [found] = problems(load, trial, with_trials=True)
    assert found.startswith("recipe.yaml:17: ")
    assert expected in found


def test_what_has_no_options_to_try(load):
    text = RECIPE.replace("{compress:", "{trials: [{training.epochs: 2}], compress:")
    [found] = problems(load, text=text)
    assert "only systems with train or distill have trials" in found
    [found] = problems(load, text=RECIPE.replace("  kd_int8:", "  kd-trial1:"))
    assert "'kd-trial1' is that of a system" in found


def test_a_recipe_without_any_has_nothing_to_compare(load, tmp_path, capsys):
    load(text=re.sub("^    trials:.*|^      - .*", "", RECIPE, flags=re.MULTILINE))
    assert main(["run", str(tmp_path), "--trials", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "recipe.yaml:4: no system has trials" in said
    assert "write trials: [{losses.kl.weight: 1.0}" in said


def test_check_finds_mistakes_in_trials_and_says_how_many_there_are(load, tmp_path, capsys):
    load()
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 trials of 2 systems" in said
    assert "different numbers of trials, which favours those with more: scratch 1, kd 2" in said
    load("{losses.kl.wieght: 1}")
    assert main(["check", str(tmp_path)]) == 2
    assert "recipe.yaml:17: systems.kd-trial2.distill.losses[1].wieght" in capsys.readouterr().err


# ---------------------------------------------------------------- the table


def option(rate: float, ter: float | None = 0.2, **changed) -> dict:
    return {"changed": changed, "rate": rate, "dev_ter": ter, "steps": 300, "stopped": "flat"}


def test_the_lowest_rate_wins_then_the_tokens_then_what_is_stated():
    stated = option(0.1)
    assert best([stated, option(0.11), option(0.1, 0.3)]) is stated
    assert best([stated, option(0.1, weight=2)]) is stated
    assert best([stated, better := option(0.1, 0.1, weight=2)]) is better
    assert best([stated, option(0.1, None)]) is stated
    assert best([stated, better := option(0.09, 0.9, weight=2)]) is better


def test_the_page_marks_the_best_and_names_who_should_change():
    kl = {"name": "kl", "options": [option(0.1), option(0.0833, **{"losses.kl.weight": 0.3})]}
    dkd = {"name": "dkd", "options": [option(0.07), option(0.09, **{"losses.dkd.beta": 2.0})]}
    data = {"recipe": "a/b", "command": "kdrecipe run a/b --trials", "seed": 1, "metric": "wer"}
    page = markdown({**data, "systems": [kl, dkd], "notes": ["a note"]})
    change = "**kl: not the best on dev**: 10.00 → 8.33 % WER with `losses.kl.weight: 0.3`."
    assert to_change([kl, dkd], "wer") == [change]
    assert f"- {change}\n- a note\n" in page
    marked = [line.split("|")[1:3] for line in page.splitlines() if "| yes " in line]
    assert [[cell.strip() for cell in row] for row in marked] == [
        ["kl", "`losses.kl.weight: 0.3`"],
        ["dkd", "as stated"],
    ]
    settled = copy.deepcopy(data) | {"systems": [dkd], "notes": []}
    assert "- All systems state the options that are the best on dev.\n" in markdown(settled)
