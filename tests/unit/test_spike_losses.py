"""Losses that move or follow the spikes of CTC, against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError
from kdrecipe.frames import keep_top
from kdrecipe.interfaces import ModelOutput, Posteriors, Targets, TargetSpec
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import VOCAB_SIZE, loss_setup, random_batch, random_output, targets_like
from kdrecipe_plugins.losses.kl import KlLoss
from kdrecipe_plugins.losses.spikes import GuidedCtc, ShiftedKl

LENS = (9, 6, 7)
BATCH = random_batch()
quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 10_000)


def make(cls, **options):
    return cls(cls.Config(**options), loss_setup())


def pair(seed=0, top_k=None):
    out = random_output(LENS, seed=seed)
    return out, targets_like(out, [TargetSpec("frame_logits", "ctc", top_k=top_k)], seed=seed + 1)


OPTIONS = {
    "guided_ctc-log": (GuidedCtc, {"log": True}),
    "shifted_kl-both": (ShiftedKl, {"earliest": -1, "latest": 1, "temperature": 2.0}),
    "shifted_kl-utterance": (ShiftedKl, {"per": "utterance", "latest": 8}),
}
CHECKS = [(n, c) for n, (cls, options) in OPTIONS.items() for c in loss_contract(cls, options).bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


# ---------------------------------------------------------------- guided_ctc


def test_guided_ctc_sums_the_students_posteriors_of_the_guides_spikes():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.2, 0.4, 0.4], [0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.9, 0.05, 0.05]])
    lens_B = torch.tensor([3])  # the last frame is padding
    out = ModelOutput(torch.zeros(1, 4, 2), lens_B, {"ctc": q.log()[None]})
    targets = Targets({"frame_logits:ctc": Posteriors(p.log()[None], lens_B)})
    result = make(GuidedCtc)(out, targets, BATCH)
    assert float(result.total) == pytest.approx(-(0.2 + 0.7))
    assert (int(result.count), int(result.metrics["agree"])) == (2, 1)
    logged = make(GuidedCtc, log=True)(out, targets, BATCH).total
    assert float(logged) == pytest.approx(-math.log(0.2) - math.log(0.7))


@quick
@given(seeds, st.integers(1, VOCAB_SIZE))
def test_guided_ctc_needs_no_more_than_the_best_class(seed, top_k):
    out, targets = pair(seed)
    want = make(GuidedCtc)(out, targets, BATCH)
    narrow = Targets({"frame_logits:ctc": keep_top(targets.posteriors(), top_k)})
    got = make(GuidedCtc)(out, narrow, BATCH)
    assert (float(got.total), int(got.count)) == (pytest.approx(float(want.total)), int(want.count))
    assert GuidedCtc.requires(GuidedCtc.Config())[0].top_k == 1


def test_a_guide_that_says_blank_only_is_0_of_0():
    out, targets = pair()
    item = targets.posteriors()
    item.log_probs_BTK[..., 0] = 10.0
    result = make(GuidedCtc)(out, targets, BATCH)
    assert (float(result.total), int(result.count)) == (0.0, 0)


# ---------------------------------------------------------------- shifted_kl


def delayed(out, targets, delay):
    """A student that says what the teacher says, so many frames later."""
    logits = targets.posteriors().log_probs_BTK.roll(delay, dims=1)
    logits[:, :delay] = torch.randn(len(LENS), delay, VOCAB_SIZE)
    return replace(out, logits={"ctc": logits})


@quick
@given(seeds, st.integers(-2, 0), st.integers(0, 3), st.booleans(), st.sampled_from([None, 2]))
def test_shifted_kl_is_the_least_over_the_delays(seed, earliest, latest, whole, top_k):
    out, targets = pair(seed)
    p, q = targets.posteriors().log_probs_BTK, out.logits["ctc"].log_softmax(-1)
    cut = keep_top(targets.posteriors(), top_k)
    if top_k:  # K + 1 classes, by hand
        kept = cut.indices_BTK
        p = torch.cat([cut.log_probs_BTK, cut.log_tail_BT[..., None]], -1)
    want, used = 0.0, 0
    for row, length in enumerate(LENS):
        by_delay = {}
        for s in range(earliest, latest + 1):
            by_delay[s] = {}
            for t in range(length):
                if 0 <= t + s < length:
                    student = q[row, t + s]
                    if top_k:
                        best = student[kept[row, t]]
                        student = torch.cat([best, (1 - best.exp().sum()).log()[None]])
                    by_delay[s][t] = float((p[row, t].exp() * (p[row, t] - student)).sum())
        if whole:
            best = min(by_delay.values(), key=lambda x: sum(x.values()) / len(x))
            want, used = want + sum(best.values()), used + len(best)
        else:
            want += sum(min(x[t] for x in by_delay.values() if t in x) for t in range(length))
            used += length
    options = {"earliest": earliest, "latest": latest, "per": "utterance" if whole else "frame"}
    result = make(ShiftedKl, top_k=top_k, **options)(out, targets, BATCH)
    assert float(result.total) == pytest.approx(want, rel=1e-3)
    assert int(result.count) == used


def test_without_delay_it_is_kl():
    out, targets = pair()
    got = make(ShiftedKl, latest=0, temperature=3.0)(out, targets, BATCH)
    want = make(KlLoss, temperature=3.0)(out, targets, BATCH)
    assert float(got.total) == pytest.approx(float(want.total))
    assert int(got.metrics["agree"]) == int(want.metrics["agree"])


@pytest.mark.parametrize("per", ["frame", "utterance"])
def test_a_late_student_that_says_the_same_is_found(per):
    out, targets = pair()
    late = delayed(out, targets, 2)
    result = make(ShiftedKl, per=per, latest=3)(late, targets, BATCH)
    if per == "utterance":  # frames at the end have no partner and are left out
        assert float(result.total) == pytest.approx(0.0, abs=1e-4)
        assert int(result.count) == sum(LENS) - 2 * len(LENS)
        assert int(result.metrics["delay"]) == 2 * int(result.count)
    strict = make(ShiftedKl, per=per, latest=1)(late, targets, BATCH)
    assert float(strict.total) > float(result.total) + 1


def test_the_delay_of_an_utterance_has_the_least_mean_not_the_least_sum():
    """At delay 2 one frame is left, which costs more than the mean of three, and less than their sum."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    q = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.5, 0.5]])
    lens_B = torch.tensor([3])
    out = ModelOutput(torch.zeros(1, 3, 2), lens_B, {"ctc": q.log()[None]})
    targets = Targets({"frame_logits:ctc": Posteriors(p.log()[None], lens_B)})
    result = make(ShiftedKl, per="utterance", latest=2)(out, targets, BATCH)
    assert (int(result.count), int(result.metrics["delay"])) == (3, 0)
    kl = [0.9 * math.log(0.9 / x) + 0.1 * math.log(0.1 / (1 - x)) for x in (0.6, 0.6, 0.5)]
    assert kl[2] < sum(kl)
    assert float(result.total) == pytest.approx(sum(kl), rel=1e-4)


def test_the_gradient_goes_to_the_chosen_frame_alone():
    out, targets = pair()
    logits = delayed(out, targets, 1).logits["ctc"][:1].clone()
    logits[0, 1:9] += 0.01 * torch.randn(8, VOCAB_SIZE)
    logits.requires_grad_(True)
    item = targets.posteriors()
    first = Posteriors(item.log_probs_BTK[:1], torch.tensor([3]))
    only = ModelOutput(out.hidden_BTD[:1], torch.tensor([3]), {"ctc": logits})
    make(ShiftedKl, latest=1, per="utterance")(
        only, Targets({"frame_logits:ctc": first}), BATCH
    ).total.backward()
    assert logits.grad[0, [1, 2]].abs().sum(-1).min() > 0
    assert logits.grad[0, [0, 3, 4]].abs().max() == 0


def test_misaligned_frames_are_refused():
    out, targets = pair()
    shorter = replace(targets.posteriors(), lens_B=out.lens_B - 1)
    for cls in (GuidedCtc, ShiftedKl):
        with pytest.raises(DataError, match="other frame counts"):
            make(cls)(out, Targets({"frame_logits:ctc": shorter}), BATCH)
