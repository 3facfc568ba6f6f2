"""Training on the device: precisions, resuming, and distillation from cached and from live targets."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from on_device import DEVICE, assert_close

from kdrecipe.cli.main import main
from kdrecipe.interfaces import LossSetup
from kdrecipe.model.asr import model_info
from kdrecipe.model.heads.ctc import CtcLoss, CtcLossOptions
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.train.loop import Objective, Term
from kdrecipe_plugins.losses.kl import KlLoss

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from train_toys import toy_batches, toy_model, toy_options, toy_run

PRECISIONS = ("fp32", "bf16", "fp16")


class Stop(Exception):
    """Injected instead of a kill."""


def run(work_dir, *, precision="fp32", seed=0, epochs=4, dropout=0.1, labelled=range(0, 30, 2), **more):
    """Distil the toy on the device from a live teacher; returns (weights, result, losses by step)."""
    teacher, student = toy_model(dropout=0.0, seed=99).to(DEVICE), toy_model(dropout, seed)
    setup = LossSetup(model_info(student, "toy"), model_info(teacher, "toy"))
    kl = KlLoss(KlLoss.Config(), setup)
    model, result = toy_run(
        work_dir,
        model=student,
        batches=toy_batches(30, labelled=labelled),
        objective=Objective([Term("ctc", 0.7, CtcLoss(CtcLossOptions())), Term("kl", 0.3, kl, "t")]),
        teachers={"t": LiveTargets(ModelTeacher(teacher), KlLoss.requires(KlLoss.Config()))},
        options=toy_options(epochs=epochs, precision=precision, log_every=1, lr=1e-2),
        dev=toy_batches(6, seed=1),
        device=str(DEVICE),
        **more,
    )
    weights = torch.cat([x.flatten().double().cpu() for x in model.state_dict().values()])
    return weights, result, step_losses(work_dir / "log.jsonl")


def step_losses(log: Path) -> list[float]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["event"] == "step"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns(tmp_path, precision):
    # Without dropout, whose random numbers are others on every kind of device.
    _, result, losses = run(tmp_path, precision=precision, epochs=8, dropout=0.0, labelled=range(30))
    wanted = {
        "fp32": "float32",
        "bf16": "bfloat16",
        "fp16": "float16" if DEVICE.type == "cuda" else "bfloat16",
    }
    assert result.precision == wanted[precision]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_interrupted_run_resumes(tmp_path, precision):
    """On a CPU bit for bit; on a GPU as near as its sums in changing order allow."""
    whole, _, losses = run(tmp_path / "whole", precision=precision)

    def stop(model, done, num_steps):
        if done == num_steps // 2:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "halves", precision=precision, on_step=stop)
    done: list[int] = []
    resumed, _, resumed_losses = run(
        tmp_path / "halves", precision=precision, seed=3, on_step=lambda model, step, num: done.append(step)
    )
    assert done[0] == len(losses) // 2, "the step that was cut off is done again, and none before"
    assert len(resumed_losses) == len(losses)
    if DEVICE.type == "cpu":
        assert torch.equal(resumed, whole)
    # The first steps depend on weights, random numbers and the optimiser's state.
    half = len(losses) // 2 - 1
    for ours, theirs in zip(resumed_losses[half : half + 4], losses[half : half + 4], strict=True):
        assert_close(ours, theirs, 0.01, "loss after resuming")


# ---------------------------------------------------------------- a recipe

RECIPE = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
tokens: {name: char}
seeds: [1]
training: {epochs: 2, batch_duration_s: 10, log_every: 1, precision: fp32, spec_augment: null}
systems:
  teacher:
    train:
      model: &model
        name: conformer
        num_layers: 1
        dim: 16
        num_heads: 2
        dropout: 0.0
        heads:
          ctc: {}
          attention: {num_layers: 1, num_heads: 2, dropout: 0.0}
          rnnt: {predictor_dim: 16, joiner_dim: 16, dropout: 0.0}
      losses: [{name: ctc}, {name: attention}, {name: rnnt}]
  kd:
    distill:
      teachers: [teacher]
      model: *model
      losses:
        - {name: ctc}
        - {name: cr_ctc}
        - {name: kl, top_k: 5}
        - {name: kl, head: attention}
        - {name: rnnt_kl}
        - {name: hidden_mse, layers: {encoder.0: encoder.0}}
  kd_int8: {compress: {from: kd, steps: [{name: magnitude_prune, epochs: 1}, {name: int8_dynamic}]}}
export: [{name: onnx_ctc}]
decode: {splits: [test]}
"""


def kdrecipe(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def test_distillation_from_cached_and_from_live_targets(tmp_path, monkeypatch):
    """A whole recipe up to the compressed student; both sources of targets teach the same."""
    corpus = make_corpus(tmp_path / "corpus", num_speakers=4, utterances_per_speaker=4)
    monkeypatch.setenv("CORPUS_ROOT", str(corpus))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    common = ("run", tmp_path, "--work", tmp_path / "work", "--jobs", 1)
    kdrecipe(*common, "--stop-stage", 6)
    system = tmp_path / "work" / "systems" / "kd"
    cached = step_losses(next(system.rglob("log.jsonl")))
    shutil.rmtree(system)
    kdrecipe(*common, "--stage", 5, "--stop-stage", 5, "--set", "targets.mode=live")
    live = step_losses(next(system.rglob("log.jsonl")))
    assert len(live) == len(cached) > 2
    # A batch put together differently moves a target by one step of the type it is stored in.
    assert_close(live[0], cached[0], 0.01, "first loss")
    assert_close(live[-1], cached[-1], 0.05, "last loss")
