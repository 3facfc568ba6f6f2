"""``kdrecipe run --trials``, through the real command line: what it trains, writes and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import SMALL, Done, kdrecipe, write_recipe

from kdrecipe.testing.corpus import make_corpus

KD = "  kd: {distill: {teachers: [teacher], model: *small, losses: [{name: ctc, weight: 0.5}, {name: kl}]}}\n"
TRIALS = """\
  kd:
    distill: {teachers: [teacher], model: *small, losses: [{name: ctc, weight: 0.5}, {name: kl}]}
    trials:
      - {losses.kl.weight: 0.0, losses.kl.top_k: 3}
      - {training.epochs: 3}
"""
SCRATCH = "  scratch: {train: {model: &small {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}\n"
WITH_TRIALS = SMALL.replace(KD, TRIALS).replace(
    SCRATCH, SCRATCH.replace("{train:", "{trials: [{training.lr: 2.0e-3}], train:")
)


class Place:
    """A recipe, and where it runs."""

    def __init__(self, directory: Path) -> None:
        self.corpus = make_corpus(directory / "corpus", num_speakers=5, utterances_per_speaker=6)
        self.recipe, self.work = directory / "small", directory / "work"
        self.write(WITH_TRIALS)

    def write(self, text: str) -> None:
        write_recipe(self.recipe, text.replace("epochs: 4", "epochs: 2"))

    def run(self, *options: str) -> Done:
        where = ("--work", self.work, "--jobs", "1")
        return kdrecipe("run", self.recipe, *where, *options, CORPUS_ROOT=self.corpus)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def first(place) -> Done:
    done = place.run("--trials")
    assert done.status == 0, done.said
    return done


def test_it_trains_what_is_stated_and_every_trial_and_looks_at_dev_alone(place, first):
    systems = ["teacher", "scratch", "scratch-trial1", "kd", "kd-trial1", "kd-trial2"]
    assert set(first.ran) == {
        *("prepare", "features", "tokens", "targets/teacher/seed1"),
        *(f"{name}/seed1" for name in systems),
        *("dev/scratch/seed1", "dev/kd/seed1", "trials"),
    }
    [page, data] = (place.recipe / name for name in ("TRIALS.md", "trials.json"))
    found = json.loads(data.read_text())
    assert [(s["name"], [o["changed"] for o in s["options"]]) for s in found["systems"]] == [
        ("scratch", [{}, {"training.lr": 0.002}]),
        ("kd", [{}, {"losses.kl.weight": 0.0, "losses.kl.top_k": 3}, {"training.epochs": 3}]),
    ]
    dev = [json.loads(x) for x in (place.work / "trials/hyps/kd/seed1/kd.jsonl").read_text().splitlines()]
    assert len(dev) == 6
    steps = [option["steps"] for option in found["systems"][1]["options"]]
    assert steps[0] == steps[1] < steps[2]
    assert "different numbers of trials" in page.read_text()
    assert page.read_text() in first.out


def test_again_it_has_nothing_to_do(place, first):
    again = place.run("--trials")
    assert (again.status, again.ran) == (0, [])


def test_a_run_shares_the_teacher_and_knows_no_trials(place, first):
    for text in (SMALL, WITH_TRIALS.replace("weight: 0.0", "weight: 0.3")):
        place.write(text)
        planned = place.run("--dry-run").out
        assert "teacher/seed1                      up to date" in planned
        assert "targets/teacher/seed1              would run: no finished output" in planned
        assert "trial" not in planned
    planned = place.run("--trials", "--dry-run").out  # of the last text
    would = {line.split()[0] for line in planned.splitlines() if "would run" in line}
    assert would == {"kd-trial1/seed1", "dev/kd/seed1", "trials"}


def test_jobs_side_by_side_know_that_they_are_of_trials(place, first):
    place.write(WITH_TRIALS)
    stage = ("--stage", "decode", "--stop-stage", "decode", "--force", "--jobs", "2")
    done = place.run("--trials", *stage)
    assert done.status == 0, done.said
    assert set(done.ran) == {"dev/scratch/seed1", "dev/kd/seed1"}
