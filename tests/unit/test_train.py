"""The training loop: exact resuming, exact normalisation, and what happens when things go wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_toys as toys
from torch import nn
from train_toys import Calm, Imitate, ToyTeacher, toy_batches, toy_model, toy_objective, toy_options, toy_run

from kdrecipe.data.batches import CutBatches
from kdrecipe.errors import KdrecipeError, TrainingError
from kdrecipe.frames import edit_distance
from kdrecipe.interfaces import LossOutput
from kdrecipe.recipe.sections import Augment, SpecAugment
from kdrecipe.train import loop
from kdrecipe.train.distribution import Workers
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.evaluation import DevScore
from kdrecipe.train.loop import Objective, Term, _check_shard
from kdrecipe.train.optimisation import (
    Cooldown,
    autocast_dtype,
    cooldown_reason,
    cpu_has_bf16,
    hidden_matrices,
    last_epoch,
    lr_factor,
    make_optimizer,
    seed_step,
    wsd_factor,
)
from kdrecipe.train.step import Stepper

SCRIPT = Path(toys.__file__)


class Stop(Exception):
    """Injected instead of a kill."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: (weights, result, log lines)."""
    directory = tmp_path_factory.mktemp("whole")
    model, result = toy_run(directory)
    return model.state_dict(), result, lines(directory)


def lines(directory, *events):
    found = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [entry for entry in found if not events or entry["event"] in events]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def deterministic(entry):
    return {k: v for k, v in entry.items() if k not in ("seconds", "audio_s_per_s")}


# ---------------------------------------------------------------- learning


def test_a_toy_is_learnt(tmp_path):
    batches = toy_batches(30)
    options = toy_options(epochs=25, lr=1e-2, spec_augment=None, checkpoint_every_s=600)
    objective = Objective([Term("ctc", 1.0, toys.ctc())])
    _, result = toy_run(
        tmp_path, model=toy_model(0.0), batches=batches, objective=objective, options=options, teachers={},
        dev=toy_batches(10, seed=1),
    )  # fmt: skip
    losses = [entry["terms"]["ctc"] for entry in lines(tmp_path, "step")]
    assert losses[-1] < 0.1 * losses[0]
    assert result.dev_ter < 0.2
    assert result.best_dev_ter <= result.history[0]["dev_ter"]
    assert result.stopped == "flat"  # long before the bound
    assert result.epochs < 25
    assert result.audio_s == pytest.approx(result.epochs * batches.duration_s(batches.ids), abs=0.1)


def test_the_log_tells_what_was_done(whole):
    _, result, log = whole
    steps = [entry for entry in log if entry["event"] == "step"]
    assert [e["step"] for e in steps] == [*range(2, result.steps + 1, 2)] + [result.steps] * (
        result.steps % 2
    )
    for entry in steps:
        assert set(entry["terms"]) == {"ctc", "calm", "imitate"}
        labelled = 0.5  # of the utterances; the other terms see all of them
        weighted = (
            labelled * 0.7 * entry["terms"]["ctc"]
            + 0.1 * entry["terms"]["calm"]
            + 0.3 * entry["terms"]["imitate"]
        )
        assert entry["loss"] == pytest.approx(weighted)
        assert entry["metrics"]["calm/frames"] == 1.0  # a sum over the count
        assert entry["lr"] > 0
        assert entry["grad_norm"] > 0
        assert entry["audio_s_per_s"] > 0
    assert [e["epoch"] for e in log if e["event"] == "epoch"] == [1, 2, 3]
    assert log[-1]["event"] == "end"
    json.dumps(result.summary())


# ---------------------------------------------------------------- resuming


def test_the_same_run_twice_is_the_same(whole, tmp_path):
    model, _ = toy_run(tmp_path)
    assert_same_weights(model.state_dict(), whole[0])


@pytest.mark.parametrize("step", [1, 4, 5, 6, 9, 15])
def test_an_interrupted_run_goes_on_bit_for_bit(step, whole, tmp_path):
    def stop(model, done, num_steps):
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        toy_run(tmp_path, on_step=stop)
    done = []
    # Another initialisation, other states of the random generators: all must come from the checkpoint.
    model, result = toy_run(tmp_path, model=toy_model(seed=3), on_step=lambda m, s, n: done.append(s))
    if step > 1:
        assert_same_weights(model.state_dict(), whole[0])
        assert done[0] == step  # the step that was cut off, not the epoch, is done again
        assert [deterministic(e) for e in lines(tmp_path)] == [deterministic(e) for e in whole[2]]
    assert result.steps == whole[1].steps
    assert result.audio_s == whole[1].audio_s


def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "kill", tmp_path, "8"], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoints" / "last.pt")["position"][2] == 7
    model, _ = toy_run(tmp_path, model=toy_model(seed=3))
    assert_same_weights(model.state_dict(), whole[0])


def test_a_finished_run_is_not_done_again(whole, tmp_path):
    toy_run(tmp_path)
    steps = []
    model, result = toy_run(tmp_path, model=toy_model(seed=3), on_step=lambda m, s, n: steps.append(s))
    assert steps == []
    assert_same_weights(model.state_dict(), whole[0])
    assert result.steps == whole[1].steps
    assert len(lines(tmp_path, "end")) == 1


def test_a_resumed_run_does_not_count_the_batches_of_all_epochs_again(tmp_path, monkeypatch):
    toy_run(tmp_path)
    counted, count = [], CutBatches.num_batches
    monkeypatch.setattr(
        CutBatches, "num_batches", lambda self, epoch: counted.append(epoch) or count(self, epoch)
    )
    toy_run(tmp_path)
    assert counted == [0]
    toy_run(tmp_path, options=toy_options(lr=1e-3))  # another run
    assert set(counted) == {0, 1, 2}


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path, capfd):
    toy_run(tmp_path)
    steps = []
    toy_run(tmp_path, options=toy_options(lr=1e-3), on_step=lambda m, s, n: steps.append(s), progress=True)
    assert steps[0] == 1
    assert "starting from the beginning: the checkpoint's options differ" in capfd.readouterr().err
    assert [e["epoch"] for e in lines(tmp_path, "epoch")] == [1, 2, 3]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, whole, monkeypatch):
    write, calls = Path.write_bytes, []

    def fill(path, data):
        if "last.pt" in path.name:
            calls.append(path)
            if len(calls) == 4:
                write(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(KdrecipeError, match="no space left"):
        toy_run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if "last" in p.name) == ["last.pt"]
    model, _ = toy_run(tmp_path)
    assert_same_weights(model.state_dict(), whole[0])


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"x")
    with pytest.raises(TrainingError, match="damaged checkpoint"):
        toy_run(tmp_path)


# ---------------------------------------------------------------- normalisation


def gradients(loaded, accumulate, objective, tmp_path):
    """Gradients of one step on micro-batches that are already loaded."""
    options = toy_options(accumulate=accumulate, spec_augment=None, grad_clip=None)
    model = toy_model(dropout=0.0)
    named = [*model.named_parameters(), *objective.named_parameters()]
    optimizer = make_optimizer(model, objective.module.parameters(), options)
    workers = Workers(0, 1, torch.device("cpu"))
    stepper = Stepper(model, objective, {"t": ToyTeacher()}, optimizer, options, workers, 0, tmp_path)
    objective.module.zero_grad()
    stepper.backward([stepper._micro(batch, slot) for slot, batch in enumerate(loaded)], step=1)
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for _, p in named])


@pytest.mark.parametrize(
    "terms",
    [
        [Term("ctc", 0.7, toys.ctc())],
        [Term("calm", 0.1, Calm())],
        [Term("ctc", 0.7, toys.ctc()), Term("calm", 0.1, Calm()), Term("imitate", 0.3, Imitate(), "t")],
    ],
    ids=["one supervised", "one unsupervised", "three"],
)
def test_accumulating_equals_one_large_batch(terms, tmp_path):
    batches = toy_batches(labelled=[0, 1, 2, 3, 4])
    ids = sorted(batches.ids, key=lambda i: batches.duration_s([i]))
    # Unequal parts, labels in two of them only: the mean of their means is far from the mean.
    parts = [ids[:9], ids[9:11], ids[11:]]
    objective = Objective(terms)
    at_once = gradients([batches.load(ids)], 1, objective, tmp_path)
    in_parts = gradients([batches.load(part) for part in parts], 3, objective, tmp_path)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-4, atol=1e-5)
    means = sum(gradients([batches.load(part)], 1, objective, tmp_path) for part in parts) / 3
    assert (means - at_once).norm() > 0.01 * at_once.norm()


@pytest.mark.parametrize("shard", ["no", "shard"])
def test_two_processes_equal_one(shard, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, SCRIPT, "rank", tmp_path / "two", tmp_path / "two.pt", shard]
        running.append(subprocess.Popen(command, env=env))
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    checkpoint = torch.load(tmp_path / "two" / "checkpoints" / "last.pt")  # whole, of divided weights, too
    toy_model().load_state_dict(checkpoint["model"])
    # The same pairs of batches in one process; the plan's groups are of accumulate * processes.
    settings = toys.distributed_settings(accumulate=2)
    assert settings["batches"].num_batches(0) % 2 == 1
    model, _ = toy_run(tmp_path / "one", **settings)
    two, two_losses = torch.load(tmp_path / "two.pt")
    losses = settings["objective"].module.state_dict()
    assert losses["3.offset"] != 0  # learnt
    assert bool((losses["3.unused"] == 1).all())  # not even decayed
    for name, value in losses.items():
        torch.testing.assert_close(two_losses[name], value, rtol=1e-4, atol=1e-5, msg=name)
    start = toy_model(dropout=0.0).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert any((two[name] - start[name]).abs().max() > 1e-3 for name in start)
    one_log, two_log = (
        [deterministic(e) for e in lines(tmp_path / d, "step", "epoch")] for d in ("one", "two")
    )
    assert len(one_log) == len(two_log)
    for a, b in zip(one_log, two_log, strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm", "dev_loss", "dev_ter"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3)


def test_a_model_that_others_read_whole_is_not_divided():
    for teachers, on_step, reader in (
        ({"ema": MovingAverage(0.9, [])}, None, "ema"),
        ({}, print, "compressor"),
    ):
        with pytest.raises(
            TrainingError, match=rf"(?s){reader}.* needs the model's weights whole.*shard: false"
        ):
            _check_shard(teachers, on_step)
    with pytest.raises(ValueError, match="shard: true goes with optimizer: adamw"):
        toy_options(shard=True)


# ---------------------------------------------------------------- what losses see


class Spy:
    """A loss that keeps what it is given."""

    def __init__(self, supervised=False, num_views=1):
        self.supervised = supervised
        self.num_views = num_views
        self.seen = []

    def __call__(self, out, targets, batch):
        self.seen.append((out, targets, batch))
        return LossOutput(out.logits["ctc"].sum(), len(batch))


def spied(terms, tmp_path, **more):
    settings = {
        "batches": toy_batches(6, labelled=[0, 1], duration_s=100.0),
        "options": toy_options(epochs=1),
    }
    toy_run(tmp_path, objective=Objective(terms), **{**settings, **more})
    return [term.loss.seen[-1] for term in terms]


def test_supervised_losses_see_labelled_utterances_only(tmp_path):
    terms = [Term("s", 1.0, Spy(supervised=True), "t"), Term("u", 1.0, Spy(), "t")]
    (s_out, s_targets, s_batch), (_, _, u_batch) = spied(terms, tmp_path)
    assert sorted(s_batch.ids) == ["c0", "c1"]
    assert len(u_batch) == 6
    rows = [u_batch.ids.index(i) for i in s_batch.ids]
    assert torch.equal(s_batch.lens_B, u_batch.lens_B[rows])
    assert len(s_out.lens_B) == len(s_targets.posteriors().lens_B) == 2


def test_a_supervised_loss_is_not_asked_about_an_unlabelled_batch(tmp_path):
    spy = Spy(supervised=True)
    terms = [Term("s", 1.0, spy), Term("u", 1.0, Calm())]
    batches = toy_batches(6, labelled=[0], duration_s=0.1)  # an utterance per batch
    toy_run(tmp_path, batches=batches, objective=Objective(terms), options=toy_options(epochs=1))
    assert {i for _, _, batch in spy.seen for i in batch.ids} == {"c0"}
    assert any("s" not in entry["terms"] for entry in lines(tmp_path, "step"))


def test_views_are_masked_differently_and_everything_is_repeated(tmp_path):
    inputs = []
    model = toy_model(0.0)
    model.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    terms = [
        Term("two", 1.0, Spy(num_views=2)),
        Term("kd", 1.0, Spy(), "t"),
        Term("s", 1.0, Spy(supervised=True)),
    ]
    two, kd, supervised = spied(terms, tmp_path, model=model)
    assert [o.num_views for o, _, _ in (two, kd, supervised)] == [2, 2, 2]
    assert two[2].ids == two[2].ids[:6] * 2
    assert kd[1].posteriors().log_probs_BTK.shape[0] == 12
    first, second = kd[1].posteriors().log_probs_BTK.chunk(2)
    assert torch.equal(first, second)
    assert sorted(supervised[2].ids) == ["c0", "c0", "c1", "c1"]
    views = inputs[-1].chunk(2)
    assert not torch.equal(*views)
    assert (views[0] == views[1]).float().mean() > 0.3


def test_teachers_see_clean_features(tmp_path):
    teacher, batches = ToyTeacher(), toy_batches(6)
    toy_run(tmp_path, batches=batches, teachers={"t": teacher}, options=toy_options(epochs=1))
    for batch in teacher.seen:
        assert torch.equal(batch.features_BTF, batches.load(batch.ids).features_BTF)


def test_losses_get_float32_whatever_the_model_computes_in(tmp_path):
    inside = []
    model = toy_model(0.0)
    model.heads["ctc"].register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    ((out, _, _),) = spied(
        [Term("u", 1.0, Spy())], tmp_path, model=model, options=toy_options(precision="bf16")
    )
    assert inside[0] == torch.bfloat16
    assert out.logits["ctc"].dtype == torch.float32


def test_taps_that_losses_name_are_there(tmp_path):
    spy = Spy()
    spy.taps = ("encoder.0",)
    ((out, _, _),) = spied([Term("u", 1.0, spy)], tmp_path)
    assert set(out.taps) == {"encoder.0"}


def test_a_losss_own_parameters_are_trained_and_not_kept(tmp_path):
    loss = Imitate()
    model, _ = toy_run(tmp_path, objective=Objective([Term("i", 1.0, loss, "t")]))
    assert loss.scale != 1.0
    assert not any("scale" in name for name in model.state_dict())


# ---------------------------------------------------------------- averaging, schedule, hooks


def test_the_result_is_the_running_average_of_the_weights(tmp_path):
    model = toy_model()
    model.register_buffer("mask", torch.zeros(1))
    trail = [{k: v.clone() for k, v in model.named_parameters()}]

    def note(model, step, num_steps):
        model.mask.fill_(step)
        trail.append({k: v.detach().clone() for k, v in model.named_parameters()})

    model, result = toy_run(tmp_path, model=model, on_step=note)
    # the power profile, written out: step s weighs s^8 - (s - 1)^8
    weights = [s**8 - (s - 1) ** 8 for s in range(1, result.steps + 1)]
    for name, value in model.named_parameters():
        steps = zip(weights, trail[1:], strict=True)
        mean = sum(w * state[name].double() for w, state in steps) / sum(weights)
        torch.testing.assert_close(value.detach(), mean.float(), rtol=1e-4, atol=1e-6)
    assert model.mask == result.steps  # buffers are the last step's
    assert not model.training


def test_without_an_average_the_result_is_the_last_weights(tmp_path):
    last = {}

    def note(model, step, num_steps):
        last.update({k: v.detach().clone() for k, v in model.named_parameters()})

    model, _ = toy_run(tmp_path, options=toy_options(average=False), on_step=note)
    assert_same_weights(dict(model.named_parameters()), last)


def test_learning_rate_rises_and_falls():
    for schedule in ("cosine", "linear", "noam", "constant"):
        factors = [lr_factor(step, 100, 10, schedule) for step in range(1, 101)]
        assert factors[9] == max(factors) == 1.0
        assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
        assert min(factors) > 0
        assert sorted(factors[9:], reverse=True) == factors[9:]
    assert lr_factor(100, 100, 10, "cosine") < 0.001
    assert lr_factor(1, 1, 0, "cosine") == 1.0


def test_wsd_warms_up_holds_and_falls_to_nearly_0():
    cooldown = Cooldown(after_epoch=6, last_epoch=8, from_step=60, num_steps=20, reason="flat")
    factors = [wsd_factor(step, 10, cooldown) for step in range(1, 81)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(factors[10:61]) == {1.0}
    assert sorted(factors[60:], reverse=True) == factors[60:]
    assert 0 < factors[-1] < 0.03
    assert wsd_factor(10**6, 10, None) == 1.0


def history(*scores):
    """A log's epochs with these dev errors; None: not scored."""
    return [{"epoch": n, "dev_ter": score} for n, score in enumerate(scores, start=1)]


FALLING = [1.0, 0.9, 0.7, 0.5, 0.4, 0.33, 0.28, 0.24, 0.21, 0.18]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (FALLING, None),
        ([*FALLING, 0.18, 0.179, 0.18, 0.181, 0.18, 0.18], "flat"),
        (
            [*FALLING, 0.18, 0.179, 0.18, 0.181, 0.18],
            None,
        ),  # one of the last six fell
        ([*FALLING, *[0.17] * 18, *[0.165] * 6], None),  # a quarter is nine by now
        ([0.95] * 20, None),  # the plateau of blanks is no end
        ([0.5, 0.5], None),  # too early to tell
        ([0.5] * 6, None),
        ([0.5] * 7, "flat"),
        # a student that was still learning: it has three epochs without much progress
        ([0.252, 0.139, 0.101, 0.086, 0.075, 0.069, 0.060, 0.049, 0.052, 0.050, 0.047], None),
        ([*FALLING[:4], None, None, None, None], None),
        ([1.0] * 79, None),
        ([1.0] * 80, "bound"),
        ([None] * 80, "no dev"),
    ],
)
def test_cooldown_begins_where_the_dev_error_is_flat_or_the_bound_is_near(scores, expected):
    options = toy_options(epochs=100, cooldown=0.25, flat=0.02)
    assert cooldown_reason(history(*scores), options) == expected


@pytest.mark.parametrize("bound", [2, 3, 7, 30])
def test_a_cooldown_that_the_bound_forces_ends_with_it(bound):
    options = toy_options(epochs=bound, cooldown=0.25)
    start = next(n for n in range(1, bound) if cooldown_reason(history(*[0.9] * n), options))
    assert start < last_epoch(start, "bound", options) == bound
    assert bound - start <= 1 + 0.25 * bound


def test_a_cooldown_lasts_a_share_of_what_came_before_it():
    options = toy_options(epochs=30, cooldown=0.25)
    assert last_epoch(20, "flat", options) == 25
    assert last_epoch(28, "flat", options) == 30


def test_a_run_ends_when_dev_is_flat_and_says_so(tmp_path, capfd):
    options = toy_options(epochs=40, flat=0.99)  # nothing falls that fast
    _, result = toy_run(tmp_path, options=options, dev=toy_batches(4, seed=1), progress=True)
    if result.history[6]["dev_ter"] <= 0.8:
        assert (result.stopped, result.cooldown_epoch, result.epochs) == ("flat", 7, 9)
        assert "the dev error is flat" in capfd.readouterr().err
    rates = [e["lr"] for e in lines(tmp_path) if e["event"] == "step"]
    assert rates[-1] < max(rates)


def test_the_bound_is_named_where_it_ends_a_run(tmp_path):
    options = toy_options(epochs=4, flat=0.0)
    _, result = toy_run(tmp_path, options=options, dev=toy_batches(4, seed=1))
    assert (result.stopped, result.cooldown_epoch, result.epochs) == ("bound", 3, 4)
    _, fixed = toy_run(tmp_path / "fixed", options=toy_options(epochs=2, schedule="cosine"))
    assert (fixed.stopped, fixed.cooldown_epoch) == ("schedule", None)


def test_masks_and_late_losses_begin_when_the_dev_error_has_fallen(tmp_path, monkeypatch):
    early, late = Spy(), Spy(num_views=2)
    scores = iter([0.9, 0.6, 0.4, 0.7, 0.3])
    monkeypatch.setattr(loop, "evaluate", lambda stepper, dev: DevScore(1.0, next(scores)))
    augment, masked = Stepper._augmented, []

    def augmented(stepping, batch, number):
        masked.append(stepping.masks_begun)
        return augment(stepping, batch, number)

    monkeypatch.setattr(Stepper, "_augmented", augmented)
    at_end = []  # of each step: whether it was masked, its views, how often the late loss was asked

    def note(model, step, num_steps):
        at_end.append((masked[-1], early.seen[-1][0].num_views, len(late.seen)))

    toy_run(
        tmp_path,
        objective=Objective([Term("early", 1.0, early), Term("late", 1.0, late, start_below=0.5)]),
        options=toy_options(
            epochs=5, schedule="cosine", spec_augment=SpecAugment(freq_width=4, start_below=0.65)
        ),
        batches=toy_batches(2, duration_s=100.0),  # one step per epoch
        teachers={},
        dev=toy_batches(4, seed=1),
        on_step=note,
    )
    # after 0.6 masks, after 0.4 the late loss, and neither ends with 0.7; the trial asks it once before
    assert at_end == [(False, 1, 1), (False, 1, 1), (True, 1, 1), (True, 2, 2), (True, 2, 3)]


def test_scenes_begin_when_the_dev_error_has_fallen_and_are_new_at_each_step(tmp_path, monkeypatch):
    scores, made = iter([0.9, 0.4, 0.7]), []
    monkeypatch.setattr(loop, "evaluate", lambda stepper, dev: DevScore(1.0, next(scores)))

    def load_augmented(batches, ids, seed):
        made.append(tuple(seed))
        return batches.load(ids)

    monkeypatch.setattr(CutBatches, "load_augmented", load_augmented)
    options = toy_options(epochs=3, schedule="cosine", augment=Augment(start_below=0.5), accumulate=2)
    _, result = toy_run(tmp_path, options=options, dev=toy_batches(4, seed=1))
    own = made[1:]  # the first one tries the longest batch
    assert len(set(own)) == len(own) == toy_batches().num_batches(2)
    assert max(seed[1] for seed in own) == result.steps


def test_small_models_are_not_masked_unless_the_recipe_says_so():
    def masks(value, **model):
        return toy_options(spec_augment=value).for_model(**model).spec_augment

    own = SpecAugment(freq_width=3)
    assert masks("auto", num_params=4_999_999) is None
    assert masks("auto", num_params=5_000_000) == SpecAugment()
    assert masks("auto", num_params=9, num_views=2) == SpecAugment()
    assert masks(own, num_params=9) == own
    assert masks(None, num_params=10**9) is None


def test_the_learning_rate_goes_by_the_models_size_unless_the_recipe_says_it():
    def rate(num_params, lr="auto", optimizer="muon"):
        return toy_options(lr=lr, optimizer=optimizer).for_model(num_params).lr

    assert rate(3_000_000) == pytest.approx(4e-3)
    assert rate(375_000) == pytest.approx(8e-3)
    assert rate(24_000_000) == pytest.approx(2e-3)
    assert rate(3_000_000, optimizer="adamw") == pytest.approx(2e-3)
    assert rate(9) == 1e-2
    assert rate(10**9) == 1e-3
    assert rate(9, lr=0.5) == 0.5


def test_without_dev_or_any_other_loss_nothing_waits(tmp_path):
    spy = Spy()
    spied([Term("u", 1.0, Spy()), Term("late", 1.0, spy, start_below=0.5)], tmp_path)
    assert len(spy.seen) > 1
    objective = Objective([Term("late", 1.0, Spy(), start_below=0.5)])
    objective.begin([])
    assert objective.at_work == [True]


def test_weight_decay_leaves_biases_and_norms_alone():
    for name in ("muon", "adamw"):
        for group in make_optimizer(toy_model(), [], toy_options(optimizer=name)).param_groups:
            assert group["weight_decay"] == (0 if group["params"][0].dim() <= 1 else 0.01)
            assert len({p.dim() > 1 for p in group["params"]}) == 1


def test_muon_gets_the_matrices_between_hidden_states_only():
    model = toy_model()
    hidden = {id(p) for p in hidden_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert names
    assert not any(name.startswith("heads.ctc") for name in names)  # its rows are tokens
    optimizer = make_optimizer(model, [], toy_options())
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    with torch.no_grad():
        before = {n: p.clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        if name in names:  # an orthogonal step: all singular values about equal
            values = torch.linalg.svdvals(p.detach() - before[name] * (1 - 5e-3 * 0.01))
            assert values.max() / values.min() < 3


def test_plugins_may_bring_optimiser_and_metrics(tmp_path):
    asked, shown = [], []

    def build_optimizer(params, config):
        asked.append(config)
        return torch.optim.SGD(params, lr=0.1)

    def train_metrics(step, student, teacher, batch):
        shown.append((step, set(teacher), student.logits["ctc"].requires_grad))
        return [{"double": 2.0 * step}, {}]

    toy_run(tmp_path, build_optimizer=build_optimizer, train_metrics=train_metrics)
    assert len(asked) == 1
    log = lines(tmp_path, "step")
    assert [entry["metrics"]["double"] for entry in log] == [2.0 * entry["step"] for entry in log]
    assert shown == [(entry["step"], {"t"}, False) for entry in log]
    assert max(entry["lr"] for entry in log) <= 0.1
    toy_run(tmp_path / "own", build_optimizer=lambda params, config: None)  # nobody has one


def test_random_numbers_hang_on_seed_step_and_slot_alone():
    def draw(*where):
        seed_step(*where)
        return torch.rand(3).tolist()

    first = draw(1, 2, 3)
    torch.rand(100)
    assert draw(1, 2, 3) == first
    assert len({tuple(draw(*where)) for where in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def test_auto_precision_is_what_the_machine_has(tmp_path):
    with_it, without = tmp_path / "with", tmp_path / "without"
    with_it.write_text("flags : fpu avx512_bf16 sse")
    without.write_text("flags : fpu avx512f sse")
    assert cpu_has_bf16(with_it)
    assert not cpu_has_bf16(without)
    assert not cpu_has_bf16(tmp_path / "absent")
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if cpu_has_bf16() else None)
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) == torch.bfloat16


def test_auto_precision_does_not_take_emulated_bf16(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert autocast_dtype("auto", gpu) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert autocast_dtype("auto", gpu) == torch.bfloat16


# ---------------------------------------------------------------- labels for some of the utterances


def test_labels_of_a_few_weigh_by_their_share_beside_terms_that_see_all(tmp_path):
    def weights(terms, labelled):
        objective = Objective(terms)
        toy_run(
            tmp_path / f"{len(terms)} {labelled}", objective=objective, teachers={},
            batches=toy_batches(20, labelled=range(labelled)), options=toy_options(epochs=1, flat_start=0),
        )  # fmt: skip
        return objective.weights

    ctc, calm = Term("ctc", 0.8, toys.ctc()), Term("calm", 0.5, toys.Calm())
    assert weights([ctc, calm], labelled=5) == pytest.approx([0.2, 0.5])
    assert weights([ctc, calm], labelled=20) == [0.8, 0.5]
    assert weights([ctc], labelled=5) == [0.8]  # nothing to balance


# ---------------------------------------------------------------- what goes wrong


def stepper(tmp_path, objective, **options):
    """A stepper on the CPU, and its model."""
    model, settings = toy_model(), toy_options(**options)
    optimizer = make_optimizer(model, objective.module.parameters(), settings)
    workers = Workers(0, 1, torch.device("cpu"))
    return Stepper(model, objective, {}, optimizer, settings, workers, 5, tmp_path), model


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_without_gradients_leave_the_loss_scale_alone(tmp_path, accumulate):
    objective = Objective([Term("ctc", 1.0, toys.ctc())])
    stepping, model = stepper(tmp_path, objective, precision="fp32", accumulate=accumulate)
    stepping.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    labelled, unlabelled = toy_batches(4), toy_batches(4, labelled=[])
    with_labels, without = (b.load(b.epoch(0)[0]) for b in (labelled, unlabelled))
    before = snapshot(model)
    for step in (1, 2):
        assert stepping.run([without], step)[0] == 0.0
    assert_same_weights(snapshot(model), before)
    assert stepping.run([with_labels], 3)[0] > 0
    assert stepping.run([without], 4)[0] == 0.0
    assert stepping.run([with_labels], 5)[0] > 0
    assert stepping.scaler.get_scale() == 1024.0
    assert any(not torch.equal(before[name], value) for name, value in snapshot(model).items())


class Breaking(Spy):
    """Fails from its ``after``-th call on (the first is the trial of the longest batch)."""

    def __init__(self, after, error=None):
        super().__init__()
        self.after, self.error = after, error

    def __call__(self, out, targets, batch):
        result = super().__call__(out, targets, batch)
        if len(self.seen) > self.after:
            if self.error:
                raise self.error
            result.total = result.total * float("nan")
        return result


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path):
    spy = Breaking(after=4)
    before = []
    with pytest.raises(TrainingError) as caught:
        toy_run(
            tmp_path, objective=Objective([Term("bad", 1.0, spy), Term("calm", 1.0, Calm())]),
            on_step=lambda m, s, n: before.append({k: v.clone() for k, v in m.state_dict().items()}),
        )  # fmt: skip
    (problem,) = caught.value.problems
    assert "loss bad is not finite at step 4" in problem.what
    assert all(word in problem.remedy for word in ("training.lr", "grad_clip", "precision"))
    saved = torch.load(problem.where, weights_only=True)
    assert saved["step"] == 4
    assert saved["batches"][0]["ids"] == spy.seen[-1][2].ids
    assert torch.equal(saved["batches"][0]["features_BTF"], spy.seen[-1][2].features_BTF)
    state = torch.load(tmp_path / "checkpoints" / "last.pt")
    assert state["position"][2] == 3
    assert_same_weights(state["model"], before[-1])


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Root(nn.Module):
        def forward(self, out, targets, batch):
            return LossOutput((out.logits["ctc"] * 0).sum().sqrt(), 1)  # 0, with an infinite slope

    with pytest.raises(TrainingError, match="the gradient is not finite at step 1"):
        toy_run(tmp_path, objective=Objective([Term("root", 1.0, Root())]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_long_a_batch_is_found_before_the_first_step(tmp_path, error):
    spy, steps, batches = Breaking(after=0, error=error), [], toy_batches()
    with pytest.raises(TrainingError, match="not enough memory") as caught:
        toy_run(
            tmp_path, batches=batches, objective=Objective([Term("big", 1.0, spy)]),
            on_step=lambda m, s, n: steps.append(s),
        )  # fmt: skip
    assert steps == []
    assert spy.seen[0][2].ids == batches.longest()
    assert "training.batch_duration_s" in str(caught.value)


class AtWork(nn.Module):
    """Notes what lies in memory when the losses are computed, besides weights and activations."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.optimizer = None
        self.seen = []

    def forward(self, out, targets, batch):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [self.optimizer.state[p] for p in parameters] if self.optimizer.state else []
        state = sum(max(value.numel() for value in one.values()) for one in states)
        self.seen.append((state, sum(p.numel() for p in parameters if p.grad is not None)))
        return LossOutput((out.logits["ctc"] * self.scale).square().sum(), len(batch))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_longest_batch_is_tried_beside_the_optimisers_state(tmp_path, accumulate):
    loss = AtWork()
    objective = Objective([Term("square", 1.0, loss)])
    stepping, model = stepper(tmp_path, objective, accumulate=accumulate)
    loss.optimizer, batches = stepping.optimizer, toy_batches(4)
    num_weights = sum(p.numel() for p in stepping.parameters)
    before, settings = snapshot(model), str(stepping.optimizer.state_dict())
    stepping.try_out(batches.load(batches.longest()))
    assert loss.seen == [(num_weights, num_weights if accumulate > 1 else 0)]
    assert_same_weights(snapshot(model), before)
    assert loss.scale.item() == 1.0
    assert str(stepping.optimizer.state_dict()) == settings
    assert all(p.grad is None for p in stepping.parameters)


def test_the_trial_leaves_the_state_of_a_resumed_run_alone(tmp_path):
    loss = AtWork()
    stepping, model = stepper(tmp_path, Objective([Term("square", 1.0, loss)]))
    loss.optimizer, batches = stepping.optimizer, toy_batches(4)
    batch = batches.load(batches.longest())
    stepping.run([batch], 1)
    before, state = snapshot(model), str(stepping.optimizer.state_dict())
    stepping.try_out(batch)
    assert loss.seen[-1][0] == sum(p.numel() for p in stepping.parameters)
    assert_same_weights(snapshot(model), before)
    assert str(stepping.optimizer.state_dict()) == state


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"):
        toy_run(tmp_path, objective=Objective([Term("x", 1.0, Breaking(1, RuntimeError("shapes differ")))]))


def test_nothing_to_learn_from_is_said_at_once(tmp_path):
    with pytest.raises(TrainingError, match="nothing to learn from"):
        toy_run(
            tmp_path, batches=toy_batches(labelled=[]), objective=Objective([Term("ctc", 1.0, toys.ctc())])
        )
    with pytest.raises(TrainingError, match="no loss"):
        Objective([])
    with pytest.raises(TrainingError, match="same name"):
        Objective([Term("a", 1.0, Calm()), Term("a", 1.0, Calm())])


def test_steps_without_labels_teach_nothing_and_do_no_harm(tmp_path):
    batches = toy_batches(6, labelled=[0], duration_s=0.1)
    model, _ = toy_run(tmp_path, batches=batches, objective=Objective([Term("ctc", 1.0, toys.ctc())]))
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---------------------------------------------------------------- small parts


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("kdrecipe.train.log._LINE_EVERY_S", 0.0)
    toy_run(tmp_path, progress=True, dev=toy_batches(4, seed=1))
    shown = capfd.readouterr().err
    assert "\r" not in shown
    assert re.search(r"step 2\b[^/]", shown)  # nobody knows yet out of how many
    assert re.search(r"step (\d+)/\1\b", shown)  # the last one, in the cool-down
    assert "dev_ter" in shown
    toy_run(tmp_path / "quiet", progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ([], [], 0),
        ([1, 2], [], 2),
        ([], [1], 1),
        ([1, 2, 3], [1, 3], 1),
        ([1, 2, 3], [3, 2, 1], 2),
        ([5], [5], 0),
    ],
)
def test_edit_distance(reference, hypothesis, errors):
    assert edit_distance(reference, hypothesis) == errors


def test_the_objective_is_that_of_the_terms():
    objective = toy_objective()
    assert objective.weights == [0.7, 0.1, 0.3]
    assert not objective.supervised_only
    assert [name for name, _ in objective.named_parameters()] == ["losses.2.scale"]
