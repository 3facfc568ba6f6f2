"""The shipped losses against their formulas; their contracts are in tests/contracts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import keep_top, valid_frames
from kdrecipe.interfaces import LossSetup, ModelInfo, ModelOutput, Posteriors, Targets
from kdrecipe.testing.models import (
    VOCAB_SIZE,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)
from kdrecipe_plugins.losses.cr_ctc import CrCtc
from kdrecipe_plugins.losses.kl import KlLoss

BATCH = random_batch()
LENS = (9, 6, 7)

seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)


def kl(**options):
    return KlLoss(KlLoss.Config(**options), loss_setup())


def pair(seed=0, top_k=None, noise=1.0):
    """A student's output and a teacher's targets."""
    out = random_output(LENS, seed=seed)
    need = replace(KlLoss.requires(KlLoss.Config())[0], top_k=top_k)
    return out, targets_like(out, [need], noise=noise, seed=seed + 1)


def by_hand(out, targets, temperature):
    """sum over valid frames of T^2 KL, the textbook way."""
    total = 0.0
    for row, length in enumerate(out.lens_B.tolist()):
        p = (targets.posteriors().log_probs_BTK[row, :length] / temperature).softmax(-1)
        q = (out.logits["ctc"][row, :length] / temperature).softmax(-1)
        total += float((p * (p.log() - q.log())).sum()) * temperature**2
    return total


def blanks(posteriors_of_blank):
    """Output and targets of one utterance with the given blank posteriors."""
    p = torch.tensor([[b, *[(1 - b) / (VOCAB_SIZE - 1)] * (VOCAB_SIZE - 1)] for b in posteriors_of_blank])
    lens_B = torch.tensor([len(p)])
    out = ModelOutput(torch.zeros(1, len(p), 2), lens_B, {"ctc": torch.randn(1, len(p), VOCAB_SIZE)})
    return out, Targets({"frame_logits:ctc": Posteriors(p.log()[None], lens_B)})


# ---------------------------------------------------------------- kl


@quick
@given(seeds, st.floats(0.5, 8.0))
def test_kl_is_the_textbook_sum(seed, temperature):
    out, targets = pair(seed)
    result = kl(temperature=temperature)(out, targets, BATCH)
    assert float(result.total) == pytest.approx(by_hand(out, targets, temperature), rel=1e-4)
    assert int(result.count) == sum(LENS)


@quick
@given(seeds, st.integers(1, VOCAB_SIZE - 1), st.floats(0.5, 4.0))
def test_kl_over_buckets_never_exceeds_the_full_kl_at_temperature_1(seed, top_k, temperature):
    out, targets = pair(seed)
    cut = Targets({"frame_logits:ctc": keep_top(targets.posteriors(), top_k)})
    full, part = kl()(out, targets, BATCH).total, kl()(out, cut, BATCH).total
    assert 0 <= float(part) <= float(full) * (1 + 1e-5)
    softened = kl(temperature=temperature)(out, cut, BATCH).total
    assert float(softened) >= 0


@quick
@given(seeds, st.integers(1, VOCAB_SIZE), st.floats(0.5, 4.0))
def test_kl_is_0_where_the_student_agrees_whatever_is_kept(seed, top_k, temperature):
    out, targets = pair(seed, top_k=top_k, noise=0.0)
    result = kl(temperature=temperature)(out, targets, BATCH)
    assert float(result.total) == pytest.approx(0.0, abs=1e-4)
    assert int(result.metrics["agree"]) == int(result.count)


def test_option_top_k_narrows_wider_targets():
    out, targets = pair()
    narrowed = kl(top_k=2)(out, targets, BATCH).total
    stored = kl()(out, pair(top_k=2)[1], BATCH).total
    assert float(narrowed) == pytest.approx(float(stored), rel=1e-5)
    assert float(narrowed) < float(kl()(out, targets, BATCH).total)


def test_t_squared_keeps_the_size_of_the_gradient():
    """For logits near 0, the gradient of T^2 KL tends to (q - p)-like differences whatever T is."""
    sizes = []
    for temperature in (4.0, 8.0, 16.0):
        out, targets = pair(noise=0.3)
        logits = (0.1 * out.logits["ctc"]).requires_grad_(True)
        loss = kl(temperature=temperature)(replace(out, logits={"ctc": logits}), targets, BATCH)
        loss.total.backward()
        sizes.append(float(logits.grad.norm()))
    assert max(sizes) < 1.25 * min(sizes)
    unscaled = [size / t**2 for size, t in zip(sizes, (4.0, 8.0, 16.0), strict=True)]
    assert max(unscaled) > 10 * min(unscaled)


def test_reverse_swaps_the_two():
    out, targets = pair()
    q = out.logits["ctc"].log_softmax(-1)
    swapped_out = replace(out, logits={"ctc": targets.posteriors().log_probs_BTK})
    swapped = Targets({"frame_logits:ctc": Posteriors(q, out.lens_B)})
    got = kl(direction="reverse")(out, targets, BATCH).total
    assert float(got) == pytest.approx(float(kl()(swapped_out, swapped, BATCH).total), rel=1e-5)
    assert float(got) != pytest.approx(float(kl()(out, targets, BATCH).total), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"blank": "keep"}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"blank": "drop"}, [2, 6]),
        ({"blank": "drop", "blank_threshold": 0.95}, [0, 2, 3, 6]),
        ({"blank": "select", "neighbours": 0}, [2, 6]),
        ({"blank": "select", "neighbours": 1}, [1, 2, 3, 5, 6, 7]),
        ({"blank": "select", "neighbours": 2}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_blank_selection(options, used):
    out, targets = blanks([0.9, 0.99, 0.1, 0.9, 0.99, 0.99, 0.2, 0.99])
    result = kl(**options)(out, targets, BATCH)
    assert int(result.count) == len(used)
    only = out.map(lambda x: x[:, used] if x.dim() == 3 else torch.tensor([len(used)]))
    kept = targets.map(lambda x: x[:, used] if x.dim() == 3 else torch.tensor([len(used)]))
    assert float(result.total) == pytest.approx(float(kl()(only, kept, BATCH).total), rel=1e-5)


def test_selection_never_reaches_into_the_padding():
    out, targets = blanks([0.99, 0.99, 0.1, 0.1])
    lens = torch.tensor([2])
    targets.items["frame_logits:ctc"] = replace(targets.posteriors(), lens_B=lens)
    assert int(kl(blank="select")(replace(out, lens_B=lens), targets, BATCH).count) == 0


def test_blank_weights_frames_by_what_is_not_blank():
    out, targets = blanks([0.75, 0.25])
    single = [
        float(kl()(replace(out, lens_B=torch.tensor([n])), replace_lens(targets, n), BATCH).total)
        for n in (1, 2)
    ]
    want = 0.25 * single[0] + 0.75 * (single[1] - single[0])
    result = kl(blank="weight")(out, targets, BATCH)
    assert float(result.total) == pytest.approx(want, rel=1e-5)
    assert int(result.count) == 2


def replace_lens(targets, length):
    return Targets({"frame_logits:ctc": replace(targets.posteriors(), lens_B=torch.tensor([length]))})


def test_all_frames_blank_is_0_of_0():
    out, targets = blanks([0.99, 0.99])
    result = kl(blank="drop")(out, targets, BATCH)
    assert (float(result.total), int(result.count)) == (0.0, 0)


def test_misaligned_frames_are_refused_with_their_counts():
    out, targets = pair()
    shorter = replace(targets.posteriors(), lens_B=out.lens_B - torch.tensor([0, 1, 0]))
    with pytest.raises(DataError, match=r"1 of 3 utterances .* has 6 and 5"):
        kl()(out, Targets({"frame_logits:ctc": shorter}), BATCH)


def test_other_tokens_are_refused():
    other = ModelInfo("other", VOCAB_SIZE, 0.04, {"ctc": ("frame_logits",)}, {})
    with pytest.raises(RecipeError, match="same tokens"):
        KlLoss(KlLoss.Config(), LossSetup(model_info(), other))


# ---------------------------------------------------------------- cr_ctc


def test_cr_ctc_is_the_mean_of_both_directions():
    out = random_output(LENS, num_views=2)
    loss = CrCtc(CrCtc.Config(), loss_setup())
    result = loss(out, Targets(), BATCH)
    a, b = (v.logits["ctc"].log_softmax(-1) for v in out.views())
    frames = (a.exp() * (a - b) + b.exp() * (b - a)).sum(-1) / 2
    assert float(result.total) == pytest.approx(
        float(valid_frames(frames, torch.tensor(LENS)).sum()), rel=1e-5
    )
    assert int(result.count) == sum(LENS)


def test_cr_ctc_stops_the_gradient_at_the_view_that_teaches():
    """Gradient of KL(sg p || q) with respect to q's logits is q - p; here half of it."""
    out = random_output(LENS, num_views=2)
    logits = out.logits["ctc"].clone().requires_grad_(True)
    CrCtc(CrCtc.Config(), loss_setup())(
        replace(out, logits={"ctc": logits}), Targets(), BATCH
    ).total.backward()
    a, b = out.logits["ctc"].softmax(-1).split(len(LENS))
    got = valid_frames(logits.grad[: len(LENS)], torch.tensor(LENS))
    torch.testing.assert_close(got, valid_frames((a - b) / 2, torch.tensor(LENS)), rtol=1e-4, atol=1e-6)


def test_equal_views_are_consistent():
    out = random_output(LENS, num_views=1)
    twice = replace(out.map(lambda x: torch.cat([x, x])), num_views=2)
    result = CrCtc(CrCtc.Config(), loss_setup())(twice, Targets(), BATCH)
    assert float(result.total) == pytest.approx(0.0, abs=1e-5)
    assert int(result.metrics["agree"]) == int(result.count)


# ---------------------------------------------------------------- classes that the teacher rules out


def ruling_out(num_classes, seed=0):
    """A student's output, and targets of a teacher with -inf for its last classes."""
    out, targets = pair(seed)
    logits_BTV = targets.posteriors().log_probs_BTK.clone()
    logits_BTV[..., VOCAB_SIZE - num_classes :] = -torch.inf
    found = Posteriors(logits_BTV.log_softmax(-1), targets.posteriors().lens_B)
    out.logits["ctc"].requires_grad_(True)
    return out, Targets({"frame_logits:ctc": found})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("num_classes", [1, 3, VOCAB_SIZE - 1])
def test_classes_that_the_teacher_rules_out_weigh_nothing(num_classes, temperature):
    out, targets = ruling_out(num_classes)
    total = kl(temperature=temperature)(out, targets, BATCH).total
    total.backward()
    student_NV = valid_frames(out.logits["ctc"].detach(), out.lens_B)
    teacher_NV = valid_frames(targets.posteriors().log_probs_BTK, out.lens_B)
    p_NV, q_NV = (teacher_NV / temperature).softmax(-1), (student_NV / temperature).softmax(-1)
    terms_NV = torch.where(p_NV > 0, p_NV * (p_NV.log() - q_NV.log()), 0.0)
    torch.testing.assert_close(total.detach(), temperature**2 * terms_NV.sum())
    got_NV = valid_frames(out.logits["ctc"].grad, out.lens_B)
    torch.testing.assert_close(got_NV, temperature * (q_NV - p_NV), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 3, VOCAB_SIZE - 1])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_k": VOCAB_SIZE - 2},
        {"direction": "reverse"},
        {"blank": "weight"},
        {"blank": "select"},
    ],
)
def test_losses_stay_finite_where_the_teacher_rules_classes_out(options, num_classes):
    out, targets = ruling_out(num_classes)
    result = kl(**options)(out, targets, BATCH)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(out.logits["ctc"].grad).all()
    if "top_k" in options and num_classes == VOCAB_SIZE - 1:  # nothing but the best class: no rest
        want = kl()(out, targets, BATCH).total
        torch.testing.assert_close(result.total, want)


# ---------------------------------------------------------------- top k


@quick
@given(seeds, st.integers(1, VOCAB_SIZE - 1))
def test_keep_top_keeps_the_best_and_all_the_mass(seed, top_k):
    full = pair(seed)[1].posteriors()
    cut = keep_top(full, top_k)
    mass = cut.log_probs_BTK.exp().sum(-1) + cut.log_tail_BT.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=1e-5)
    best = full.log_probs_BTK.topk(top_k).values
    torch.testing.assert_close(cut.log_probs_BTK, best)
    torch.testing.assert_close(full.log_probs_BTK.gather(-1, cut.indices_BTK), best)
    again = keep_top(keep_top(full, min(top_k + 1, VOCAB_SIZE)), top_k)
    torch.testing.assert_close(again.log_tail_BT, cut.log_tail_BT)
    assert keep_top(full, VOCAB_SIZE) is full
