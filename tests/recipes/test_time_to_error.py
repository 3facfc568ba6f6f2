"""The benchmark of time to error, on a corpus of a few words: what it runs and prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT, SMALL, environment, kdrecipe

from kdrecipe.testing.corpus import make_corpus

SCRIPT = ROOT / "benchmarks" / "time_to_error.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(recipe, work directory) with the teacher's targets, and the environment that goes with them."""
    root = tmp_path_factory.mktemp("time_to_error")
    make_corpus(root / "corpus")
    recipe = root / "small"
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text(SMALL)
    done = kdrecipe("run", recipe, "--work", root / "exp", "--stop-stage", 4, CORPUS_ROOT=root / "corpus")
    assert done.status == 0, done.said
    return recipe, root / "exp", environment(CORPUS_ROOT=root / "corpus")


def measure(prepared, *arguments):
    recipe, work, env = prepared
    command = [sys.executable, SCRIPT, recipe, "--work", work, *arguments]
    return subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=400)


def test_variants_run_in_turn_and_known_runs_are_not_run_again(prepared, tmp_path):
    wanted = ("--variants", "now", "before", "--seeds", 1, 2, "--levels", 0.5, 1.5, "--limit-s", 60)
    page = tmp_path / "curves.json"
    done = measure(prepared, *wanted, "--system", "kd", "--out", page)
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"^(\w+) seed (\d):", done.stderr, re.MULTILINE)
    assert ran == [("now", "1"), ("before", "1"), ("now", "2"), ("before", "2")]
    known = json.loads(page.read_text())
    for step, cpu_s, error in known["now"]["1"]["curve"]:
        assert step > 0
        assert 0 < cpu_s < 60
        assert error >= 0
    assert len(known["before"]["1"]["curve"]) <= 16  # epochs, of a student
    [now] = [line for line in done.stdout.splitlines() if line.startswith("| now | 2 |")]
    assert now.count("|") == 7
    again = measure(prepared, *wanted, "--system", "kd", "--out", page)
    assert again.stdout == done.stdout
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("system", "variant"),
    [
        ("teacher", "scaled_adam"),
        ("teacher", "cr_ctc_at_once"),
        ("teacher", "rare_blank"),
        ("teacher", "short_first"),
        ("kd", "kl_later"),
    ],
)
def test_every_kind_of_variant_trains(prepared, system, variant):
    short = ("--seeds", 1, "--levels", 0.01, "--set", "training.epochs=2")
    done = measure(prepared, "--system", system, "--variants", variant, *short)
    assert done.returncode == 0, done.stderr
    assert "| 0 of 1 |" in done.stdout


def test_a_run_ends_at_its_limit_or_below_the_lowest_level(prepared):
    limited = measure(prepared, "--variants", "now", "--seeds", 1, "--levels", 0.01, "--limit-s", 0.001)
    assert "| no epoch" in limited.stderr
    assert "> 0 |" in limited.stdout
    easy = measure(prepared, "--variants", "now", "--seeds", 1, "--levels", 9)
    assert re.search(r"now seed 1: \d+ \|", easy.stderr)  # one epoch
    assert "| 1 of 1 |" in easy.stdout
