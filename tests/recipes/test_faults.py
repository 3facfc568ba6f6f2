"""What goes wrong in real life: kills, damaged files, bad corpora, failing jobs, two runs at once."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import time
from pathlib import Path

import pytest
from runs import ONE, SMALL, command, environment, kdrecipe, kill_when, write_recipe

from kdrecipe.testing.corpus import make_corpus

SYSTEMS = ("teacher", "scratch", "kd", "kd_int8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), num_speakers=5, utterances_per_speaker=6)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small", SMALL)


@pytest.fixture(scope="module")
def whole(recipe, corpus, tmp_path_factory) -> Path:
    """Work directory of a run that nothing disturbed, one job after the other."""
    work = tmp_path_factory.mktemp("whole") / "work"
    done = kdrecipe("run", recipe, "--work", work, "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    return work


def weights(work: Path) -> dict[str, str]:
    """Hash of every system's weights."""
    files = {name: work / "systems" / name / "seed1" / "weights.pt" for name in SYSTEMS}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def has_traceback(text: str) -> bool:
    return "Traceback" in text


# ---------------------------------------------------------------- kills


def test_killed_again_and_again_it_ends_with_the_same_weights(recipe, corpus, whole, tmp_path):
    work, log = tmp_path / "work", tmp_path / "log"
    one, two = (["run", recipe, "--work", work, "--jobs", jobs] for jobs in "12")

    def checkpoint(name: str) -> Path:
        return work / "systems" / name / "seed1.partial" / "train" / "checkpoints" / "last.pt"

    kill_when(lambda said: (work / "features" / "started.json").exists(), log, *one, CORPUS_ROOT=corpus)
    assert not (work / "features" / "stamp.json").exists()

    kill_when(lambda said: "tokens done" in said, log, *one, CORPUS_ROOT=corpus)

    # The trainer is a process of its own here, and must end with the one that was killed.
    kill_when(lambda said: checkpoint("teacher").exists(), log, *two, CORPUS_ROOT=corpus)
    assert not (work / "systems" / "teacher" / "seed1").exists()
    time.sleep(0.5)
    before = checkpoint("teacher").read_bytes()
    time.sleep(0.5)
    assert checkpoint("teacher").read_bytes() == before

    kill_when(lambda said: checkpoint("kd").exists(), log, *one, CORPUS_ROOT=corpus)
    assert "teacher/seed1 ... (interrupted before, resumes)" in log.read_text()
    assert "resuming after step" in log.read_text()

    kill_when(lambda said: "stage 8 decode: decode/teacher/seed1 ..." in said, log, *one, CORPUS_ROOT=corpus)
    assert "kd/seed1 ... (interrupted before, resumes)" in log.read_text()

    done = kdrecipe(*one, CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    assert weights(work) == weights(whole)
    left = [p for pattern in ("*.partial", "*.old", ".*.part", "started.json") for p in work.rglob(pattern)]
    assert left == []
    log_lines = (work / "systems" / "kd" / "seed1" / "train" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log_lines if '"event": "epoch"' in line]
    assert steps == sorted(set(steps))
    assert len(steps) == 4


def test_two_jobs_give_the_weights_of_one(recipe, corpus, whole, tmp_path):
    done = kdrecipe(
        "run", recipe, "--work", tmp_path / "work", "--jobs", "2", "--stop-stage", "6", CORPUS_ROOT=corpus
    )
    assert done.status == 0, done.said
    assert weights(tmp_path / "work") == weights(whole)


# ---------------------------------------------------------------- damaged files


def test_a_cut_file_is_noticed_and_made_again(recipe, corpus, whole):
    path, before = whole / "systems" / "kd" / "seed1" / "weights.pt", weights(whole)
    path.write_bytes(path.read_bytes()[:-500])
    done = kdrecipe("run", recipe, "--work", whole, "--jobs", "1", CORPUS_ROOT=corpus)
    assert done.status == 0, done.said
    assert "kd/seed1 ... (weights.pt is missing or damaged)" in done.out
    assert weights(whole) == before
    assert not {"teacher/seed1", "scratch/seed1", "decode/scratch/seed1"} & set(done.ran)


def test_numbers_that_rotted_are_noticed_when_they_are_read(recipe, corpus, whole):
    path = whole / "systems" / "scratch" / "seed1" / "weights.pt"
    good = path.read_bytes()
    try:
        path.write_bytes(good[:5000] + bytes([good[5000] ^ 0xFF]) + good[5001:])
        stage = ("--stage", "export", "--stop-stage", "export", "--force", "--jobs", "1")
        done = kdrecipe("run", recipe, "--work", whole, *stage, CORPUS_ROOT=corpus)
    finally:
        path.write_bytes(good)
    assert done.status == 2, done.said
    assert "the weights are damaged" in done.err
    assert not has_traceback(done.said)


# ---------------------------------------------------------------- bad corpora


def rewrite(path: Path, change) -> None:
    """Change a manifest's entries: ``change(list)`` gives the new list."""
    with gzip.open(path, "rt") as file:
        rows = change([json.loads(line) for line in file])
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def bad_corpus(tmp_path) -> Path:
    """Audio that is missing, an id that occurs twice, a text too long for its audio."""
    root = make_corpus(tmp_path / "bad", num_speakers=4, utterances_per_speaker=5)
    (root / "audio" / "spk00-0001.wav").unlink()

    def change(rows: list[dict]) -> list[dict]:
        rows[3]["text"] = "RED " * 200
        return [*rows, rows[2]]

    rewrite(root / "train_supervisions.jsonl.gz", change)
    return root


def test_all_that_is_wrong_with_a_corpus_is_told_at_once(bad_corpus, tmp_path):
    recipe = write_recipe(tmp_path / "one", ONE)
    done = kdrecipe("run", recipe, "--work", tmp_path / "work", CORPUS_ROOT=bad_corpus)
    assert done.status == 2
    assert not has_traceback(done.said)
    assert "kdrecipe: 2 problems" in done.err
    assert "1 transcript without audio" in done.err
    assert "spk00-0001.wav" in done.err
    assert "1 id that occurs more than once" in done.err
    assert "spk00-0002" in done.err
    assert "corpus.on_error: skip" in done.err


def test_text_too_long_for_its_audio_is_told_before_training(bad_corpus, corpus, tmp_path):
    rewrite(bad_corpus / "train_supervisions.jsonl.gz", lambda rows: [rows[0], *rows[2:-1]])
    recipe = write_recipe(tmp_path / "one", ONE)
    done = kdrecipe("run", recipe, "--work", tmp_path / "work", CORPUS_ROOT=bad_corpus)
    assert done.status == 2, done.said
    assert not has_traceback(done.said)
    assert "1 utterance too short for its text" in done.err
    assert "spk00-0003" in done.err
    assert "stage 3" not in done.out


def test_what_is_skipped_is_in_the_report(bad_corpus, tmp_path):
    recipe = write_recipe(
        tmp_path / "one", ONE.replace("{name: manifests,", "{name: manifests, on_error: skip,")
    )
    work = tmp_path / "work"
    done = kdrecipe("run", recipe, "--work", work, "--jobs", "1", CORPUS_ROOT=bad_corpus)
    assert done.status == 0, done.said
    assert json.loads((work / "tokens" / "left_out.json").read_text()) == ["spk00-0003"]
    report = json.loads((work / "report" / "results.json").read_text())
    left_out = {entry["id"]: entry["reason"] for entry in report["corpus_summary"]["left_out"]}
    assert left_out["spk00-0001"].startswith("transcript without audio")
    assert left_out["spk00-0002"].startswith("id that occurs more than once")
    assert left_out["spk00-0003"].startswith("utterance too short for its text")
    text = (work / "report" / "RESULTS.md").read_text()
    assert "transcript without audio" in text
    assert "utterance too short for its text" in text


def test_a_corpus_that_is_not_there(tmp_path):
    recipe = write_recipe(tmp_path / "one", ONE)
    unset = kdrecipe("run", recipe, "--work", tmp_path / "work")
    absent = kdrecipe("run", recipe, "--work", tmp_path / "work", CORPUS_ROOT=tmp_path / "nothing")
    for done, word in ((unset, "CORPUS_ROOT"), (absent, "not a directory")):
        assert done.status == 2
        assert word in done.err
        assert not has_traceback(done.said)


# ---------------------------------------------------------------- jobs that fail, runs that meet

BROKEN = '''
"""A loss that is never finite."""

from kdrecipe import hookimpl
from kdrecipe.interfaces import LossOutput, Options


class Broken:
    """Not a number, whatever comes."""

    class Config(Options):
        """No options."""

    def __init__(self, config, setup):
        self.config = config

    def __call__(self, out, targets, batch):
        return LossOutput(out.logits["ctc"].sum() * float("nan"), 1)


@hookimpl
def register_losses(register):
    register("broken", Broken)
'''


def test_a_failing_job_lets_the_others_finish(corpus, tmp_path):
    text = ONE.replace("systems:\n", "plugins: {files: [plugin.py]}\nsystems:\n")
    text = text.replace(
        "\nexport:",
        "\n  broken:\n    train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}, "
        "losses: [{name: broken}]}\nexport:",
    ).replace("epochs: 1", "epochs: 20, batch_duration_s: 5")
    recipe, work = write_recipe(tmp_path / "one", text), tmp_path / "work"
    (recipe / "plugin.py").write_text(BROKEN)
    done = kdrecipe("run", recipe, "--work", work, "--jobs", "2", CORPUS_ROOT=corpus)
    assert done.status == 1, done.said
    assert not has_traceback(done.said)
    assert "the loss broken is not finite at step 1" in done.out
    assert "broken/seed1 FAILED (exit 1)" in done.out
    assert "failed: broken/seed1" in done.err
    assert "scratch/seed1" in done.ran
    assert (work / "systems" / "scratch" / "seed1" / "stamp.json").exists()


def test_a_second_run_in_the_same_place_is_refused(recipe, corpus, tmp_path):
    work = tmp_path / "work"
    arguments = ["run", recipe, "--work", work, "--set", "training.epochs=500"]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(
            command(*arguments), env=environment(CORPUS_ROOT=corpus), stdout=log, stderr=log
        )
    try:
        while not (work / "manifests" / "stamp.json").exists():
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        second = kdrecipe(*arguments, CORPUS_ROOT=corpus)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert second.status == 2
    assert "another process is working on this recipe" in second.err
    assert "--work DIR" in second.err
    assert not has_traceback(second.said)


def test_a_file_in_the_way_of_the_work_directory(recipe, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    done = kdrecipe("run", recipe, "--work", tmp_path / "file", CORPUS_ROOT=corpus)
    assert done.status == 2
    assert "choose another directory with --work DIR" in done.err
    assert not has_traceback(done.said)


def test_stages_out_of_order_say_where_to_start(recipe, corpus, tmp_path):
    one = ("--stage", "distill", "--stop-stage", "distill")
    done = kdrecipe("run", recipe, "--work", tmp_path / "work", *one, CORPUS_ROOT=corpus)
    assert done.status == 2
    assert "start with --stage 0" in done.err
    assert "prepare (no finished output)" in done.err
    assert not (tmp_path / "work").exists()


# ---------------------------------------------------------------- made again


def test_what_is_made_again_and_comes_out_the_same_changes_nothing(corpus, tmp_path):
    text = ONE.replace(
        "export:", "  int8: {compress: {from: scratch, steps: [{name: int8_dynamic}]}}\nexport:"
    )
    recipe, work = write_recipe(tmp_path / "one", text), tmp_path / "work"
    run = ("run", recipe, "--work", work, "--jobs", "1", "--stop-stage", "6")
    assert kdrecipe(*run, CORPUS_ROOT=corpus).status == 0
    for lost, job in (("features", "features"), ("systems/scratch/seed1", "scratch/seed1")):
        before = json.loads((work / lost / "stamp.json").read_text())
        (work / lost / "stamp.json").unlink()
        again = kdrecipe(*run, CORPUS_ROOT=corpus)
        assert again.ran == [job], again.said
        assert "int8/seed1 up to date after all, skipped" in again.out
        assert json.loads((work / lost / "stamp.json").read_text())["content"] == before["content"]
    made = json.loads((work / "systems" / "scratch" / "seed1" / "provenance.json").read_text())
    assert {"date", "git", "machine", "versions", "seconds"} <= made.keys()
