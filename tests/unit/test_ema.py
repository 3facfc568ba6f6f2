"""A teacher that is the student's own moving average."""

from __future__ import annotations

import pytest
import torch
import train_toys as toys
from train_toys import Imitate, ToyTeacher, toy_batches, toy_model, toy_options, toy_run

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import LossSetup, Progress, TargetSpec
from kdrecipe.testing.models import loss_setup, model_info, random_batch, random_output, targets_like
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.loop import Objective, Term
from kdrecipe_plugins.losses.askd import AdaptiveSelfKd
from kdrecipe_plugins.losses.kl import KlLoss

NEED = TargetSpec("frame_logits", "ctc", dtype="float32")


class Stop(Exception):
    pass


def started(decay=0.75, model=None):
    model, average = model or toy_model(dropout=0.0), MovingAverage(decay, [NEED])
    average.start(model)
    return model, average


def test_it_follows_the_student_in_full_precision():
    model, average = started()
    name = next(n for n, _ in model.named_parameters())
    before = model.state_dict()[name].clone()
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    average.update()
    average.update()
    want = before + (1 - 0.75**2)
    torch.testing.assert_close(average.state_dict()[name], want)
    half, slow = started(0.999, toy_model(dropout=0.0).to(torch.bfloat16))
    start = slow.state_dict()[name].clone()
    with torch.no_grad():
        for p in half.parameters():
            p += 1.0
    slow.update()
    moved = (slow.state_dict()[name] - start).mean()
    assert slow.state_dict()[name].dtype == torch.float32
    assert float(moved) == pytest.approx(0.001, rel=0.05)  # in bf16 it would be 0


def test_it_speaks_with_its_own_weights_and_without_dropout_or_gradient():
    model, average = started(model=toy_model(dropout=0.5))
    batch = toy_batches(2).load(["c0", "c1"])
    said = average.targets(batch).posteriors().log_probs_BTK
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        want = toy_model(dropout=0.0)(batch.features_BTF, batch.lens_B).logits["ctc"].log_softmax(-1)
    torch.testing.assert_close(average.targets(batch).posteriors().log_probs_BTK, said)
    valid = batch.lens_B.max() // 4
    torch.testing.assert_close(said[0, : valid // 2], want[0, : valid // 2])
    assert not said.requires_grad
    assert model.training  # the copy alone is in evaluation mode


def self_taught(work_dir, **more):
    objective = Objective([Term("ctc", 0.7, toys.ctc()), Term("own", 0.3, Imitate(), "ema")])
    average = MovingAverage(0.9, [NEED])
    model, _ = toy_run(work_dir, objective=objective, teachers={"ema": average}, **more)
    return model.state_dict(), average.state_dict()


def test_a_run_with_it_resumes_bit_for_bit(tmp_path):
    def stop(model, done, num_steps):
        if done == 8:
            raise Stop

    weights, average = self_taught(tmp_path / "whole")
    with pytest.raises(Stop):
        self_taught(tmp_path / "parts", on_step=stop)
    kept = torch.load(tmp_path / "parts" / "checkpoints" / "last.pt")["teachers"]["ema"]
    assert all(x.dtype == torch.float32 for x in kept.values() if x.is_floating_point())
    again, average_again = self_taught(tmp_path / "parts", model=toy_model(seed=3))
    for name, value in weights.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(average_again[name], average[name]), name
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def test_it_sees_every_step_also_with_accumulation(tmp_path):
    seen = []
    objective = Objective([Term("own", 1.0, Imitate(), "ema")])
    average = MovingAverage(0.5, [NEED])
    update = average.update
    average.update = lambda: (seen.append(1), update())
    _, result = toy_run(
        tmp_path, objective=objective, teachers={"ema": average}, options=toy_options(accumulate=2, epochs=2)
    )
    assert len(seen) == result.steps


# ---------------------------------------------------------------- from the teacher to the own average

LENS = (9, 6, 7)
SETUP = LossSetup(model_info(), teachers={"big": model_info(), "ema": model_info()})


@pytest.mark.parametrize(("step", "own"), [(1, 0.2), (6, 0.5), (11, 0.8), (99, 0.8)])
def test_askd_goes_from_the_teacher_to_the_average(step, own):
    out, batch = random_output(LENS), random_batch([4 * n for n in LENS])
    config = AdaptiveSelfKd.Config(steps=11, start=0.2, end=0.8, temperature=2.0)
    needs = AdaptiveSelfKd.requires(config)
    targets = {name: targets_like(out, needs, seed=seed) for name, seed in (("big", 1), ("ema", 2))}
    kl = KlLoss(KlLoss.Config(temperature=2.0), loss_setup())
    big, ema = (float(kl(out, targets[name], batch).total) for name in ("big", "ema"))
    found = AdaptiveSelfKd(config, SETUP)(out, targets, batch, progress=Progress(step, 100))
    assert float(found.total) == pytest.approx((1 - own) * big + own * ema, rel=1e-5)
    assert int(found.count) == sum(LENS)


@pytest.mark.parametrize("names", [["big"], ["ema"], ["big", "small"]])
def test_askd_needs_a_teacher_and_the_average(names):
    setup = LossSetup(model_info(), teachers=dict.fromkeys(names, model_info()))
    with pytest.raises(RecipeError, match=r"teachers: \[<a system>, ema\]"):
        AdaptiveSelfKd(AdaptiveSelfKd.Config(steps=3), setup)


def test_both_kinds_of_teachers_side_by_side(tmp_path):
    objective = Objective([Term("t", 1.0, Imitate(), "t"), Term("own", 1.0, Imitate(), "ema")])
    teachers = {"t": ToyTeacher(), "ema": MovingAverage(0.9, [NEED])}
    _, result = toy_run(tmp_path, objective=objective, teachers=teachers, options=toy_options(epochs=1))
    assert result.steps > 0
