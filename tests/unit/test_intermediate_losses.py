"""CTC layers at intermediate layers against their formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import keep_top
from kdrecipe.interfaces import LossSetup, ModelInfo, Targets, TargetSpec
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import (
    VOCAB_SIZE,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)
from kdrecipe_plugins.losses.intermediate import InterCtcKl, SelfCtcKl

LENS = (9, 6, 7)
BATCH = random_batch(num_tokens=(2, 3, 1))
TAPS = ["encoder.0", "encoder.2"]

OPTIONS = {
    "inter_ctc_kl-hot": (InterCtcKl, {"layers": TAPS, "temperature": 2.0, "ctc_weight": 0.0}),
    "inter_ctc_kl-top-2": (InterCtcKl, {"layers": TAPS, "top_k": 2}),
    "self_ctc_kl-one": (SelfCtcKl, {"layers": TAPS[:1], "temperature": 3.0, "ctc_weight": 0.3}),
}
CHECKS = [(n, c) for n, (cls, options) in OPTIONS.items() for c in loss_contract(cls, options).bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


def case(cls, seed=0, top_k=None, **options):
    loss = cls(cls.Config(layers=TAPS, **options), loss_setup())
    out = random_output(LENS, taps=TAPS, seed=seed)
    out.taps["encoder.2"] = out.taps["encoder.2"] + 1
    return loss, out, targets_like(out, [TargetSpec("frame_logits", "ctc", top_k=top_k)], seed=seed + 1)


def by_hand(loss, out, log_p, temperature, ctc_weight, labelled=(0, 1, 2)):
    total = 0.0
    for tap, layer in zip(TAPS, loss.layers, strict=True):
        for row, length in enumerate(LENS):
            logits = out.taps[tap][row, :length] @ layer.weight.T + layer.bias
            p, q = ((x / temperature).softmax(-1) for x in (log_p[row, :length], logits))
            total += temperature**2 * float((p * (p.log() - q.log())).sum())
            if row in labelled:
                tokens = BATCH.tokens_BU[row, : BATCH.token_lens_B[row]][None]
                nll = F.ctc_loss(
                    logits.log_softmax(-1)[:, None], tokens, (length,), (tokens.shape[1],), reduction="sum"
                )
                total += ctc_weight * float(nll)
    return total


@pytest.mark.parametrize(("temperature", "ctc_weight"), [(1.0, 1.0), (2.0, 0.25), (1.0, 0.0)])
def test_inter_ctc_kl_is_kl_and_ctc_at_every_layer(temperature, ctc_weight):
    loss, out, targets = case(InterCtcKl, temperature=temperature, ctc_weight=ctc_weight)
    result = loss(out, targets, BATCH)
    want = by_hand(loss, out, targets.posteriors().log_probs_BTK, temperature, ctc_weight)
    assert float(result.total.detach()) == pytest.approx(want, rel=1e-4)
    assert int(result.count) == 2 * sum(LENS)


def test_unlabelled_utterances_have_the_kl_only():
    loss, out, targets = case(InterCtcKl)
    batch = replace(BATCH, labelled_B=torch.tensor([True, False, True]))
    want = by_hand(loss, out, targets.posteriors().log_probs_BTK, 1.0, 1.0, labelled=(0, 2))
    assert float(loss(out, targets, batch).total.detach()) == pytest.approx(want, rel=1e-4)


def test_option_top_k_narrows_wider_targets():
    loss, out, targets = case(InterCtcKl, top_k=2, ctc_weight=0.0)
    narrow = Targets({"frame_logits:ctc": keep_top(targets.posteriors(), 2)})
    got = float(loss(out, targets, BATCH).total.detach())
    assert got == pytest.approx(float(loss(out, narrow, BATCH).total.detach()))


def test_self_ctc_kl_learns_from_the_top_without_teaching_it():
    loss, out, _ = case(SelfCtcKl, temperature=2.0, ctc_weight=0.5)
    out.logits["ctc"].requires_grad_(True)
    result = loss(out, Targets(), BATCH)
    want = by_hand(loss, out, out.logits["ctc"].detach(), 2.0, 0.5)
    assert float(result.total.detach()) == pytest.approx(want, rel=1e-4)
    result.total.backward()
    assert out.logits["ctc"].grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


@pytest.mark.parametrize("cls", [InterCtcKl, SelfCtcKl])
def test_unknown_taps_and_other_frames_are_refused(cls):
    config = cls.Config(layers=["encoder.99"])
    with pytest.raises(RecipeError, match=rf"{cls.name}: the student declares no tap 'encoder\.99'"):
        cls(config, loss_setup())
    student = replace(model_info(), tap_shifts_s={"encoder.0": 0.02})
    with pytest.raises(RecipeError, match=r"'encoder\.0' has a frame every 0\.02 s"):
        cls(cls.Config(layers=TAPS), LossSetup(student, model_info()))


def test_other_tokens_and_frames_of_the_teacher_are_refused():
    other = ModelInfo("other", VOCAB_SIZE, 0.04, {"ctc": ("frame_logits",)}, {})
    with pytest.raises(RecipeError, match=r"inter_ctc_kl compares .* same tokens"):
        InterCtcKl(InterCtcKl.Config(layers=TAPS), LossSetup(model_info(), other))
    loss, out, targets = case(InterCtcKl)
    shorter = replace(targets.posteriors(), lens_B=out.lens_B - 1)
    with pytest.raises(DataError, match="other frame counts"):
        loss(out, Targets({"frame_logits:ctc": shorter}), BATCH)
