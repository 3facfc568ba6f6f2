"""Losses that change while a run goes on: what they are told of it, and that it resumes."""

from __future__ import annotations

import math

import pytest
import torch
import train_toys as toys
from train_toys import Calm, toy_batches, toy_model, toy_options, toy_run

from kdrecipe.interfaces import LossOutput, LossSetup, ModelInfo, ModelOutput, Posteriors, Progress, Targets
from kdrecipe.testing.models import loss_setup, random_batch
from kdrecipe.train import loop
from kdrecipe.train.evaluation import DevScore
from kdrecipe.train.loop import Objective, Term
from kdrecipe_plugins.losses.cr_ctc import CrCtc
from kdrecipe_plugins.losses.taid import Taid

BATCH = random_batch()


def taid(**options):
    return Taid(Taid.Config(**{"steps": 11, **options}), loss_setup())


def one_frame(p, q):
    """Output and targets of one frame, from probabilities."""
    lens_B = torch.tensor([1])
    out = ModelOutput(torch.zeros(1, 1, 2), lens_B, {"ctc": torch.tensor(q).log()[None, None]})
    return out, Targets({"frame_logits:ctc": Posteriors(torch.tensor(p).log()[None, None], lens_B)})


@pytest.mark.parametrize(
    ("step", "steps", "num_steps", "share"),
    [(1, 11, 100, 0.0), (6, 11, 100, 0.5), (11, 11, 100, 1.0), (50, 11, 100, 1.0),
     (1, 1, 9, 1.0), (1, 0, 9, 1.0), (3, 1000, 5, 0.5), (5, 1000, 5, 1.0)],
)  # fmt: skip
def test_a_schedule_is_done_after_its_steps_or_with_the_run(step, steps, num_steps, share):
    assert Progress(step, num_steps).share(steps) == pytest.approx(share)


def test_taid_is_the_kl_from_between_the_two():
    out, targets = one_frame([0.7, 0.2, 0.1], [0.2, 0.3, 0.5])
    # halfway: the geometric mean, sqrt(.14), sqrt(.06), sqrt(.05), over its sum
    roots = [math.sqrt(x) for x in (0.14, 0.06, 0.05)]
    between = [x / sum(roots) for x in roots]
    want = sum(m * math.log(m / q) for m, q in zip(between, (0.2, 0.3, 0.5), strict=True))
    result = taid(start=0.0)(out, targets, BATCH, progress=Progress(6, 100))
    assert float(result.total) == pytest.approx(want, rel=1e-5)
    assert int(result.count) == 1
    at_first = taid(start=0.0)(out, targets, BATCH, progress=Progress(1, 100))
    assert float(at_first.total) == pytest.approx(0.0, abs=1e-6)
    plain = sum(p * math.log(p / q) for p, q in zip((0.7, 0.2, 0.1), (0.2, 0.3, 0.5), strict=True))
    at_last = taid(start=0.0)(out, targets, BATCH, progress=Progress(90, 100))
    assert float(at_last.total) == pytest.approx(plain, rel=1e-5)


def test_the_gradient_of_taid_pulls_to_the_target_between():
    out, targets = one_frame([0.7, 0.2, 0.1], [0.2, 0.3, 0.5])
    out.logits["ctc"].requires_grad_(True)
    taid(start=0.0)(out, targets, BATCH, progress=Progress(6, 100)).total.backward()
    roots = torch.tensor([0.14, 0.06, 0.05]).sqrt()
    want = torch.tensor([0.2, 0.3, 0.5]) - roots / roots.sum()
    torch.testing.assert_close(out.logits["ctc"].grad[0, 0], want)


def test_t_hurries_while_the_loss_falls():
    loss = taid(start=0.4, alpha=0.1, beta=0.5, steps=10_000)
    loss.after_step(2.0, Progress(1, 10_000))
    assert float(loss.t) == pytest.approx(0.4)  # there is nothing to compare with yet
    loss.after_step(1.0, Progress(2, 10_000))
    line = 0.4 + 0.6 / 9_999
    momentum = 0.5 * (2.0 - 1.0) / 2.0
    want = line + 0.1 / (1 + math.exp(-momentum)) * (1 - line)
    assert float(loss.t) == pytest.approx(want)
    loss.after_step(math.inf, Progress(3, 10_000))
    assert float(loss.t) == pytest.approx(want)
    assert loss.at(Progress(1, 10_000)) == pytest.approx(want)
    assert loss.at(Progress(10_000, 10_000)) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"end": 1.2}, "less than or equal to 1"), ({"start": 0.9, "end": 0.5}, "rises from start to end"),
     ({"head": "attention", "align": "mean"}, "goes by tokens")],
)  # fmt: skip
def test_a_schedule_beyond_1_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Taid.Config(steps=10, **options)


def test_the_weight_of_cr_ctc_rises():
    out = ModelOutput(torch.zeros(2, 1, 2), torch.tensor([1, 1]), {"ctc": torch.randn(2, 1, 3)}, num_views=2)
    values = [
        float(CrCtc(CrCtc.Config(warmup_steps=n), loss_setup())(out, Targets(), BATCH, progress=p).total)
        for n, p in ((0, Progress(1, 9)), (5, Progress(1, 9)), (5, Progress(3, 9)), (5, Progress(9, 9)))
    ]
    assert values == pytest.approx([values[0], 0.0, values[0] / 2, values[0]])


class Told:
    """Keeps the progress that it is told."""

    def __init__(self):
        self.seen = []

    def __call__(self, out, targets, batch, *, progress):
        self.seen.append((progress.step, progress.num_steps))
        return LossOutput(out.logits["ctc"].square().sum(), len(batch))


def test_progress_counts_from_the_step_at_which_a_loss_begins(tmp_path, monkeypatch):
    scores = iter([0.9, 0.4, 0.7, 0.3])
    monkeypatch.setattr(loop, "evaluate", lambda stepper, dev: DevScore(1.0, next(scores)))
    early, late = Told(), Told()
    toy_run(
        tmp_path,
        objective=Objective([Term("early", 1.0, early), Term("late", 1.0, late, start_below=0.5)]),
        options=toy_options(epochs=4, schedule="cosine", spec_augment=None),
        batches=toy_batches(2, duration_s=100.0),  # one step per epoch
        teachers={},
        dev=toy_batches(4, seed=1),
    )
    assert early.seen[1:] == [(1, 4), (2, 4), (3, 4), (4, 4)]  # the first one tries the longest batch
    assert late.seen[1:] == [(1, 2), (2, 2)]


def moving_objective():
    info = ModelInfo("toy", len(toys.ToyTokens()), 0.04, {"ctc": ("frame_logits",)}, {})
    loss = Taid(Taid.Config(steps=10, alpha=0.1), LossSetup(info, info))
    return Objective([Term("ctc", 1.0, toys.ctc()), Term("taid", 1.0, loss, "t")])


class Stop(Exception):
    pass


def test_an_adaptive_schedule_resumes_bit_for_bit(tmp_path):
    def stop(model, done, num_steps):
        if done == 7:
            raise Stop

    objective = moving_objective()
    whole, _ = toy_run(tmp_path / "whole", objective=objective)
    with pytest.raises(Stop):
        toy_run(tmp_path / "parts", objective=moving_objective(), on_step=stop)
    resumed = moving_objective()
    again, _ = toy_run(tmp_path / "parts", model=toy_model(seed=3), objective=resumed)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    t, t_again = (float(o.terms[1].loss.t) for o in (objective, resumed))
    assert t_again == t
    assert t > 0.4  # it moved


def test_a_loss_is_told_its_value_over_the_whole_step(tmp_path):
    values = []

    class Listening(Calm):
        def after_step(self, value, progress):
            values.append((value, progress.step))

    for accumulate, duration_s in ((1, 100.0), (3, 1.8)):
        batches = toy_batches(6, duration_s=duration_s)
        assert batches.num_batches(0) == accumulate
        options = toy_options(accumulate=accumulate, epochs=1, spec_augment=None)
        objective = Objective([Term("a", 1.0, Listening())])
        toy_run(tmp_path / str(accumulate), model=toy_model(dropout=0.0), batches=batches,
                objective=objective, options=options, teachers={})  # fmt: skip
    (one, step), (parts, _) = values
    assert step == 1
    assert parts == pytest.approx(one, rel=1e-5)
