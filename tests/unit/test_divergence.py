"""Runs that will not come back are stopped, with the batch, the cause and remedies; others are not."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from train_toys import Calm, Term, toy_batches, toy_objective, toy_options, toy_run

from kdrecipe.errors import MissingExtra, TrainingError
from kdrecipe.interfaces import LossOutput
from kdrecipe.train.divergence import Divergence, fell_silent
from kdrecipe.train.evaluation import evaluate
from kdrecipe.train.log import TENSORBOARD, TrainLog
from kdrecipe.train.loop import Objective


class Growing:
    """A loss whose value grows without end, whatever the model does."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, targets, batch):
        self.calls += 1
        return LossOutput(out.hidden_BTD.sum() * 0 + 4.0**self.calls, 1)


def test_an_exploding_loss_stops_the_run_with_its_batch(tmp_path):
    objective = Objective([Term("calm", 1.0, Calm()), Term("growing", 1.0, Growing())])
    with pytest.raises(TrainingError, match=r"loss growing has exploded .* at step") as caught:
        toy_run(tmp_path, objective=objective, options=toy_options(epochs=5, log_every=1))
    (problem,) = caught.value.problems
    assert all(word in problem.remedy for word in ("training.lr", "grad_clip", "warmup_steps"))
    saved = torch.load(problem.where, weights_only=True)
    assert saved["losses"][0]["growing"] > 100
    assert " ".join(saved["batches"][0]["ids"][:5]) in problem.what


def test_what_only_looks_like_an_explosion_does_not_count():
    low = Divergence()  # a start from another's weights; then masks begin
    assert not any(low.look({"ctc": value}) for value in (0.01, 0.01, 3.0, 5.0, 30.0, 60.0))
    once = Divergence()
    assert not any(once.look({"ctc": value}) for value in (20.0, 5.0, 500.0, 5.0, 500.0, 5.0))
    large = Divergence()  # hidden states that were large from the beginning
    assert not any(large.look({"mse": value}) for value in (5e3, 2e4, 4e4))
    assert large.look({"mse": 6e4}) is None
    resumed = Divergence()
    resumed.load_state_dict(large.state_dict())
    assert resumed.look({"mse": 7e4}) == "mse"


def scores(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"dev_ter": ter, "dev_said": said} for ter, said in pairs]


@pytest.mark.parametrize(
    ("history", "silent"),
    [
        (scores((0.5, 0.9), (1.0, 0.0), (1.0, 0.01)), True),
        (scores((1.0, 0.0), (1.0, 0.0), (1.0, 0.0)), False),  # the plateau at the start
        (scores((0.5, 0.9), (1.0, 0.0)), False),
        (scores((0.5, 0.9), (1.0, 0.0), (0.9, 0.1)), False),
        (scores((0.5, 0.9)) + [{"dev_ter": None}] * 3, False),
    ],
)
def test_a_model_that_fell_silent_is_told_from_one_that_has_not_begun(history, silent):
    assert fell_silent(history) == silent


def test_a_model_that_falls_silent_stops_the_run(tmp_path, monkeypatch):
    found = iter([(0.4, 0.9), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0)])

    def scored(stepper, dev):
        ter, said = next(found)
        return type(evaluate(stepper, dev))(1.0, ter, said)

    monkeypatch.setattr("kdrecipe.train.loop.evaluate", scored)
    with pytest.raises(TrainingError, match="fallen silent"):
        toy_run(tmp_path, dev=toy_batches(4, seed=1), options=toy_options(epochs=5))
    assert (tmp_path / "diverged.pt").exists()


def test_dev_counts_what_is_said(tmp_path):
    _, result = toy_run(tmp_path, dev=toy_batches(4, seed=1), options=toy_options(epochs=1))
    assert 0 <= result.history[0]["dev_said"] < 5


def test_tensorboard_has_what_the_log_has_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv(TENSORBOARD, str(tmp_path / "board"))
    path = tmp_path / "systems" / "kd" / "seed1.partial" / "train"
    toy_run(path, objective=toy_objective(), options=toy_options(epochs=1, log_every=1))
    board = EventAccumulator(str(tmp_path / "board" / "kd" / "seed1"))
    board.Reload()
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    wanted = [(e["step"], pytest.approx(e["terms"]["calm"], rel=1e-5)) for e in lines if e["event"] == "step"]
    assert [(e.step, e.value) for e in board.Scalars("terms/calm")] == wanted
    assert {"loss", "lr", "grad_norm", "audio_s_per_s"} <= set(board.Tags()["scalars"])
    assert "board" not in [p.name for p in path.parent.rglob("*")]


def test_without_tensorboard_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(TENSORBOARD, str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kdrecipe\[tensorboard\]'"):
        TrainLog(tmp_path / "log.jsonl").rewind(0)
