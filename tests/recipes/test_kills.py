"""A run that is killed at any moment, again and again, ends with what an undisturbed one gives.

A few kills in each run of the suite; ``tests/kill.sh`` does 100.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from runs import SMALL, command, environment, kdrecipe, write_recipe

from kdrecipe.testing.corpus import make_corpus

KILLS = int(os.environ.get("KDRECIPE_KILLS", "10"))
SEED = int(os.environ.get("KDRECIPE_KILL_SEED", str(time.time_ns() % 10**6)))
MAX_JOBS_ON = 3  # the kill comes in one of the next so many jobs


class Runs:
    """The same recipe, undisturbed once, and killed as often as asked for."""

    def __init__(self, home: Path) -> None:
        text = SMALL.replace("epochs: 4", "epochs: 2").replace("[0.9, 1.0, 1.1]", "[0.9, 1.0]")
        self.recipe = write_recipe(home / "recipe", text)
        self.corpus = make_corpus(home / "corpus", num_speakers=4, utterances_per_speaker=3)
        self.home = home
        self.rng = random.Random(SEED)
        self.killed: Counter[str] = Counter()
        whole = home / "whole"
        done = kdrecipe(*self.arguments(whole, 1), CORPUS_ROOT=self.corpus)
        assert done.status == 0, done.said
        self.seconds = {stamp["job"]: stamp["seconds"] for stamp in stamps(whole).values()}
        self.whole = results(whole)

    def arguments(self, work: Path, jobs: int) -> list[str]:
        return ["run", str(self.recipe), "--work", str(work), "--jobs", str(jobs)]

    def run_and_kill(self, work: Path) -> bool:
        """Kill one run at a random moment of one of its next jobs; False: it was done before."""
        log = self.home / "log"
        ahead, share, jobs = (
            self.rng.randint(1, MAX_JOBS_ON),
            self.rng.uniform(0, 1.1),
            self.rng.choice([1, 2]),
        )
        with open(log, "w") as file:
            process = subprocess.Popen(
                command(*self.arguments(work, jobs)),
                env=environment(CORPUS_ROOT=self.corpus),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while len(begun := re.findall(r"^stage \d+ \w+: (\S+) \.\.\.", log.read_text(), re.M)) < ahead:
                if process.poll() is not None:
                    assert process.returncode == 0, log.read_text()
                    return False
                time.sleep(0.01)
            moment = time.monotonic() + share * self.seconds[begun[-1]]
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.002)
        finally:
            alive = process.poll() is None
            if alive:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if alive:
            self.killed[begun[-1]] += 1
        else:
            assert process.returncode == 0, log.read_text()
        return alive


def stamps(work: Path) -> dict[str, dict]:
    """Folder -> what its stamp says."""
    found = sorted(work.rglob("stamp.json"))
    return {str(path.parent.relative_to(work)): json.loads(path.read_text()) for path in found}


def results(work: Path) -> dict[str, object]:
    """What must not depend on when and how often a run was killed: all that is made but for times."""
    found: dict[str, object] = {}
    for folder, stamp in stamps(work).items():
        if folder.startswith("hyps"):
            texts = sorted((work / folder).rglob("*.jsonl"))
            found[folder] = {str(path.relative_to(work)): path.read_text() for path in texts}
        elif folder != "report":
            found[folder] = stamp["content"]
    report = json.loads((work / "report" / "results.json").read_text())
    found["table"] = {row["name"]: row["splits"] for row in report["systems"]}
    return found


def test_a_run_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(tmp_path):
    start = time.monotonic()
    runs = Runs(tmp_path)
    rounds = 0
    while sum(runs.killed.values()) < KILLS:
        work = tmp_path / f"work{rounds}"
        while sum(runs.killed.values()) < KILLS and runs.run_and_kill(work):
            pass
        done = kdrecipe(*runs.arguments(work, 1), CORPUS_ROOT=runs.corpus)
        assert done.status == 0, f"seed {SEED}: {done.said}"
        assert results(work) == runs.whole, f"seed {SEED}, killed in {dict(runs.killed)}"
        left = [p for name in ("*.partial", "*.old", ".*.part", "started.json") for p in work.rglob(name)]
        assert left == []
        rounds += 1
    said = (
        f"{sum(runs.killed.values())} kills in {rounds} runs, seed {SEED}, {time.monotonic() - start:.0f} s: "
    )
    print(said + ", ".join(f"{job} {number}" for job, number in sorted(runs.killed.items())))
