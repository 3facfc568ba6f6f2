"""One recipe on several processes of ``torchrun``: what the first one owns, and what all do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdrecipe.errors import KdrecipeError
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.run import run_recipe
from kdrecipe.stages.team import Team, _quiet_end
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.train.distribution import Workers

# 21 utterances of train in batches of one or two: the last step of an epoch has one batch for two processes.
RECIPE = """
corpus: {name: manifests, root: ROOT}
features: {name: fbank, num_mel_bins: 20}
tokens: {name: char}
seeds: [1]
plugins: {files: [plugin.py]}
training:
  {epochs: 2, batch_duration_s: 6, precision: fp32, schedule: cosine, log_every: 1, checkpoint_every_s: 1e-9}
systems:
  teacher: {train: {model: &small {name: conformer, num_layers: 1, dim: 16, num_heads: 2, heads: {ctc: {}}}}}
  kd:
    distill:
      teachers: [teacher, ema]
      init_from: teacher
      model: *small
      losses: [{name: ctc}, {name: kl, weight: 0.5}]
"""

# Dies in the middle of an epoch of the student, once.
PLUGIN = """
import os, signal
from kdrecipe import hookimpl

@hookimpl
def train_metrics(step, teacher):
    here = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if here == ("1", "0") and teacher and step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    corpus = make_corpus(tmp_path / "corpus", num_speakers=5, utterances_per_speaker=7)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(corpus)))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return tmp_path


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=180, check=False
    )


def steps(work: Path, system: str) -> list[dict]:
    lines = (work / "systems" / system / "seed1" / "train" / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "step"]


def test_a_recipe_on_two_processes_of_which_one_dies_is_that_of_one(folder, capsys):
    two, one = folder / "two", folder / "one"
    options = ("run", folder, "--stop-stage", 5, "--work", two)
    ended = torchrun("--max-restarts", 1, "--monitor-interval", 0.1, "-m", "kdrecipe.cli", *options)
    assert ended.returncode == 0, ended.stderr
    assert "kd/seed1: resuming after step 4" in ended.stderr
    assert (
        ended.stdout.count("stage 3 teacher: teacher/seed1 ... ") == 1
    )  # the first one speaks, and keeps it
    number = len(steps(two, "kd"))
    assert [e["step"] for e in steps(two, "kd")] == list(range(1, number + 1))
    run_recipe(load_recipe(folder), 0, 5, dry_run=True, work=two)
    assert "would run" not in capsys.readouterr().out
    run_recipe(load_recipe(folder, overrides=["training.accumulate=2"]), 0, 5, work=one)
    registry = load_plugins().registry
    for system in ("teacher", "kd"):
        a, b = steps(one, system), steps(two, system)
        assert [e["loss"] for e in b] == pytest.approx([e["loss"] for e in a], rel=1e-4)
        paths = (work / "systems" / system / "seed1" for work in (one, two))
        for x, y in zip(*(Bundle.load(path, registry).model.parameters() for path in paths), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4)


def test_the_others_read_the_recipe_when_there_is_something_to_do(monkeypatch):
    """So that only the first process says what is wrong with it."""
    asked = []
    team = object.__new__(Team)
    monkeypatch.setattr(team, "_say", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    team.follow(lambda: asked.append(1))
    assert not asked


def test_a_process_whose_peer_has_ended_ends_with_one_line(monkeypatch, capfd):
    monkeypatch.setattr(os, "_exit", lambda status: asked.append(status))
    asked = []
    with _quiet_end():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:19155")
    assert asked == [1]
    assert capfd.readouterr().err.strip() == "kdrecipe: process 0 ends, since another one has ended"
    with pytest.raises(RuntimeError, match="shapes"), _quiet_end():
        raise RuntimeError("shapes differ")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(KdrecipeError, match=r"process 2 .* there are 2.*\n.*--nproc 2"):
        Workers.from_environment()


def test_several_gpus_without_nccl_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KdrecipeError, match="NCCL"):
        Workers.from_environment()
