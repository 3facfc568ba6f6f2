"""Losses between posteriors: what all of them hold to, and each against its formula."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import all_classes, keep_top
from kdrecipe.interfaces import LossSetup, ModelInfo, ModelOutput, Posteriors, Targets, TargetSpec
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import (
    VOCAB_SIZE,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)
from kdrecipe_plugins.losses.frames import (
    DecoupledKl,
    Dist,
    JensenShannon,
    LogitL2,
    SkewKl,
    SoftmaxL2,
    StandardisedKl,
)
from kdrecipe_plugins.losses.kl import KlLoss

LENS = (9, 6, 7)
BATCH = random_batch(num_tokens=[n - 1 for n in LENS])

LOSSES = {
    "kl": (KlLoss, {}),
    "kl-reverse": (KlLoss, {"direction": "reverse"}),
    "skew_kl": (SkewKl, {}),
    "skew_kl-reverse": (SkewKl, {"skew": 0.3, "direction": "reverse"}),
    "jsd": (JensenShannon, {}),
    "jsd-0.9": (JensenShannon, {"share": 0.9}),
    "dkd": (DecoupledKl, {"beta": 8.0}),
    "dkd-best": (DecoupledKl, {"target": "best", "alpha": 0.5}),
    "logit_std": (StandardisedKl, {}),
    "logit_std-2": (StandardisedKl, {"temperature": 2.0}),
    "softmax_l2": (SoftmaxL2, {}),
    "logit_l2": (LogitL2, {}),
    "dist": (Dist, {}),
}
NARROW = [name for name, (cls, _) in LOSSES.items() if not cls.all_classes]

each = pytest.mark.parametrize("name", LOSSES)
quick = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10_000)


def make(name, **more):
    cls, options = LOSSES[name]
    return cls(cls.Config(**options, **more), loss_setup())


def pair(seed=0, noise=1.0, top_k=None, lens=LENS):
    """A student's output and a teacher's targets."""
    out = random_output(lens, seed=seed)
    need = TargetSpec("frame_logits", "ctc", top_k=top_k)
    return out, targets_like(out, [need], noise=noise, seed=seed + 1)


def value(loss, out, targets):
    return float(loss(out, targets, BATCH).total)


def one(q, p):
    """Output and targets of one utterance with the given posteriors, (T, V) each."""
    lens_B = torch.tensor([len(q)])
    out = ModelOutput(torch.zeros(1, len(q), 2), lens_B, {"ctc": torch.tensor(q).log()[None]})
    return out, Targets({"frame_logits:ctc": Posteriors(torch.tensor(p).log()[None], lens_B)})


# ---------------------------------------------------------------- all of them


OPTIONS = {  # the defaults: tests/contracts
    "kl-reverse": LOSSES["kl-reverse"],
    "skew_kl-drop": (SkewKl, {"blank": "drop", "temperature": 3.0}),
    "dkd-top-2": (DecoupledKl, {"top_k": 2}),
    "jsd-select": (JensenShannon, {"blank": "select"}),
    "softmax_l2-attention": (SoftmaxL2, {"head": "attention", "temperature": 2.0}),
    "dkd-attention": (DecoupledKl, {"head": "attention", "target": "best"}),
    "logit_l2-weight": (LogitL2, {"blank": "weight"}),
    "dist-hot": (Dist, {"temperature": 4.0, "gamma": 2.0}),
}
CHECKS = [(n, c) for n, (cls, options) in OPTIONS.items() for c in loss_contract(cls, options).bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


@each
@quick
@given(seeds)
def test_least_and_0_where_both_agree(name, seed):
    out, targets = pair(seed, noise=0.0)
    assert value(make(name), out, targets) == pytest.approx(0.0, abs=1e-3)
    out, targets = pair(seed)
    assert value(make(name), out, targets) > 0


@pytest.mark.parametrize("name", NARROW)
@quick
@given(seeds, st.integers(1, VOCAB_SIZE - 1), st.floats(0.5, 4.0))
def test_0_over_k_and_the_rest_where_both_agree(name, seed, top_k, temperature):
    out, targets = pair(seed, noise=0.0, top_k=top_k)
    assert value(make(name, temperature=temperature), out, targets) == pytest.approx(0.0, abs=1e-3)


@each
@quick
@given(seeds)
def test_a_constant_added_to_a_frames_logits_changes_nothing(name, seed):
    out, targets = pair(seed)
    moved = out.logits["ctc"] + 5 * torch.arange(out.logits["ctc"].shape[1])[:, None]
    got = value(make(name), replace(out, logits={"ctc": moved}), targets)
    assert got == pytest.approx(value(make(name), out, targets), rel=1e-3)


@each
@quick
@given(seeds)
def test_an_utterance_does_not_depend_on_its_neighbours(name, seed):
    out, targets = pair(seed)
    rows = [torch.arange(len(LENS)) == row for row in range(len(LENS))]
    alone = [
        value(make(name), out.select(row_B), targets.map(lambda x, row_B=row_B: x[row_B])) for row_B in rows
    ]
    assert value(make(name), out, targets) == pytest.approx(sum(alone), rel=1e-4)


@each
def test_dropped_frames_are_as_if_there_were_none(name):
    out, targets = pair(3, lens=(9,))
    p = targets.posteriors().log_probs_BTK.clone()
    p[0, [1, 4, 5]] = torch.tensor([0.95, *[0.01] * 5]).log()
    targets = Targets({"frame_logits:ctc": Posteriors(p, out.lens_B)})
    kept = [t for t in range(9) if float(p[0, t, 0].exp()) <= 0.5]
    assert 0 < len(kept) < 9
    only = out.map(lambda x: x[:, kept] if x.dim() == 3 else torch.tensor([len(kept)]))
    short = targets.map(lambda x: x[:, kept] if x.dim() == 3 else torch.tensor([len(kept)]))
    assert value(make(name, blank="drop"), out, targets) == pytest.approx(
        value(make(name), only, short), rel=1e-4
    )


@each
def test_tokens_of_a_decoder_count_as_frames_do(name):
    if name.startswith("dkd") and "best" not in name:
        pytest.skip("tokens have no blank")
    out, targets = pair(5)
    item = targets.posteriors()
    tokens = replace(out, logits={"attention": out.logits["ctc"]})
    taught = Targets({"token_logits:attention": Posteriors(item.log_probs_BTK, BATCH.token_lens_B + 1)})
    result = make(name, head="attention")(tokens, taught, BATCH)
    assert float(result.total) == pytest.approx(value(make(name), out, targets), rel=1e-5)
    assert int(result.count) == sum(LENS)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 2])
def test_finite_where_the_student_is_sure_and_wrong(name, dtype, top_k):
    """float16 ends at 65504, its exponentials far below."""
    if top_k and name not in NARROW:
        pytest.skip("it needs all classes")
    out, targets = pair(top_k=top_k)
    logits = (1000 * out.logits["ctc"]).to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = make(name)(replace(out, logits={"ctc": logits}), targets, BATCH).total
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


@each
def test_finite_where_the_teacher_rules_classes_out_and_the_student_is_uniform(name):
    out, targets = pair()
    p = targets.posteriors().log_probs_BTK.clone()
    p[..., 1:] = -torch.inf
    logits = torch.zeros_like(out.logits["ctc"]).requires_grad_(True)
    item = Posteriors(p.log_softmax(-1), out.lens_B)
    total = make(name)(replace(out, logits={"ctc": logits}), Targets({"frame_logits:ctc": item}), BATCH).total
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in NARROW])
def test_losses_that_need_all_classes_refuse_fewer(name):
    out, targets = pair(top_k=VOCAB_SIZE - 2)
    with pytest.raises(DataError, match="4 of 6 classes per frame"):
        make(name)(out, targets, BATCH)
    assert "top_k" not in LOSSES[name][0].Config.model_fields


@each
def test_other_tokens_and_a_missing_head_are_refused(name):
    cls, options = LOSSES[name]
    other = ModelInfo("other", VOCAB_SIZE, 0.04, {"ctc": ("frame_logits",)}, {})
    with pytest.raises(RecipeError, match=f"{cls.name} compares .* same tokens"):
        cls(cls.Config(**options), LossSetup(model_info(), other))
    with pytest.raises(RecipeError, match="reads the head 'ctc'"):
        cls(cls.Config(**options), LossSetup(ModelInfo("tiny", VOCAB_SIZE, 0.04, {}, {})))


@given(seeds)
@quick
def test_all_classes_puts_back_what_is_known(seed):
    item = pair(seed)[1].posteriors()
    for narrow in (item, keep_top(item, VOCAB_SIZE - 1)):
        found = all_classes(narrow, VOCAB_SIZE)
        torch.testing.assert_close(found.log_probs_BTK, item.log_probs_BTK)
        assert found.indices_BTK is None


# ---------------------------------------------------------------- each against its formula

P, Q = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], [[0.5, 0.25, 0.25], [0.6, 0.3, 0.1]]


def by_hand(name, expected, **more):
    assert value(make(name, **more), *one(Q, P)) == pytest.approx(expected, rel=1e-4)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p, q, share):
    return [(1 - share) * a + share * b for a, b in zip(p, q, strict=True)]


def softened(p, temperature):
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def test_skew_kl():
    # first frame: m = 0.1 p + 0.9 q = (0.52, 0.245, 0.235)
    first = 0.7 * math.log(0.7 / 0.52) + 0.2 * math.log(0.2 / 0.245) + 0.1 * math.log(0.1 / 0.235)
    by_hand("skew_kl", first + kl(P[1], mix(P[1], Q[1], 0.9)))
    by_hand("skew_kl-reverse", sum(kl(q, mix(q, p, 0.7)) for p, q in zip(P, Q, strict=True)))
    soft = [(softened(p, 2), softened(q, 2)) for p, q in zip(P, Q, strict=True)]
    by_hand("skew_kl", 4 * sum(kl(p, mix(p, q, 0.9)) for p, q in soft), temperature=2.0)


@given(seeds)
@quick
def test_skew_kl_without_skew_is_kl_and_is_bounded_with_it(seed):
    out, targets = pair(seed, noise=100.0)
    plain = SkewKl(SkewKl.Config(skew=0.0), loss_setup())
    assert value(plain, out, targets) == pytest.approx(value(make("kl"), out, targets), rel=1e-4)
    assert value(make("skew_kl"), out, targets) <= -math.log(0.1) * sum(LENS) * (1 + 1e-5)


def test_jsd():
    # first frame: m = (0.6, 0.225, 0.175)
    first = (
        0.7 * math.log(0.7 / 0.6)
        + 0.2 * math.log(0.2 / 0.225)
        + 0.1 * math.log(0.1 / 0.175)
        + 0.5 * math.log(0.5 / 0.6)
        + 0.25 * math.log(0.25 / 0.225)
        + 0.25 * math.log(0.25 / 0.175)
    ) / 2
    m = mix(P[1], Q[1], 0.5)
    by_hand("jsd", first + (kl(P[1], m) + kl(Q[1], m)) / 2)
    pairs = [(p, q, mix(p, q, 0.9)) for p, q in zip(P, Q, strict=True)]
    by_hand("jsd-0.9", sum(0.1 * kl(p, m) + 0.9 * kl(q, m) for p, q, m in pairs))


def test_jsd_tends_to_kl_in_either_direction():
    out, targets = pair()
    for share, name, size in ((0.999, "kl", 0.001), (0.001, "kl-reverse", 0.001)):
        jsd = JensenShannon(JensenShannon.Config(share=share), loss_setup())
        assert value(jsd, out, targets) / size == pytest.approx(value(make(name), out, targets), rel=0.02)


def test_dkd():
    # first frame: the blank is class 0; the others alone are (2/3, 1/3) and (1/2, 1/2)
    tckd = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    nckd = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    second = kl([0.1, 0.9], [0.6, 0.4]) + 8 * kl([1 / 3, 2 / 3], [3 / 4, 1 / 4])
    by_hand("dkd", tckd + 8 * nckd + second)
    # target: best is class 2 on the second frame
    second = 0.5 * kl([0.6, 0.4], [0.1, 0.9]) + kl([1 / 4, 3 / 4], [2 / 3, 1 / 3])
    by_hand("dkd-best", 0.5 * tckd + nckd + second)


@given(seeds, st.integers(1, VOCAB_SIZE))
@quick
def test_kl_is_tckd_and_nckd_by_the_mass_of_the_others(seed, top_k):
    """Frame by frame, whatever is kept: for a frame, beta is 1 - p(target)."""
    out, targets = pair(seed, lens=(1,))
    item = keep_top(targets.posteriors(), top_k)
    blank = float(targets.posteriors().log_probs_BTK[0, 0, 0].exp())
    if item.indices_BTK is not None and 0 not in item.indices_BTK[0, 0]:
        blank = float(item.log_tail_BT[0, 0].exp())
    dkd = DecoupledKl(DecoupledKl.Config(beta=1 - blank), loss_setup())
    narrow = Targets({"frame_logits:ctc": item})
    assert value(dkd, out, narrow) == pytest.approx(value(make("kl"), out, narrow), rel=1e-3, abs=1e-5)


def test_dkd_on_tokens_needs_another_target_than_the_blank():
    with pytest.raises(ValueError, match="set target: best"):
        DecoupledKl.Config(head="attention")


def test_logit_std():
    def softmax(logits, temperature):
        z = [(x - statistics.mean(logits)) / statistics.stdev(logits) / temperature for x in logits]
        return [math.exp(x) / sum(map(math.exp, z)) for x in z]

    for name, temperature in (("logit_std", 1.0), ("logit_std-2", 2.0)):
        expected = 0.0
        for p, q in zip(P, Q, strict=True):
            soft = [softmax([math.log(x) for x in posteriors], temperature) for posteriors in (p, q)]
            expected += temperature**2 * kl(*soft)
        by_hand(name, expected)


def test_logit_std_does_not_care_about_the_range_of_logits():
    out, targets = pair()
    narrower = replace(out, logits={"ctc": 0.1 * out.logits["ctc"] - 3})
    want = value(make("logit_std"), out, targets)
    assert value(make("logit_std"), narrower, targets) == pytest.approx(want, rel=1e-4)


def test_softmax_l2():
    by_hand("softmax_l2", 0.2**2 + 0.05**2 + 0.15**2 + 0.5**2 + 0.5**2)


def test_logit_l2_and_kl_at_a_high_temperature():
    expected = 0.0
    for p, q in zip(P, Q, strict=True):
        expected += statistics.pvariance([math.log(a) - math.log(b) for a, b in zip(p, q, strict=True)])
    by_hand("logit_l2", expected)
    out, targets = pair()
    hot = value(make("kl", temperature=100.0), out, targets)
    assert hot == pytest.approx(value(make("logit_l2"), out, targets) / 2, rel=0.05)


def test_dist():
    inter = sum(1 - np.corrcoef(p, q)[0, 1] for p, q in zip(P, Q, strict=True))
    p, q = np.array(P), np.array(Q)
    # of two frames, a class's correlation is 1 or -1: class 1 rises in both, the others only in one
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(3)])
    by_hand("dist", inter + 2 * intra)


@given(seeds)
@quick
def test_dist_over_utterances_of_different_length(seed):
    out, targets = pair(seed)
    expected = 0.0
    for row, length in enumerate(LENS):
        p = targets.posteriors().log_probs_BTK[row, :length].exp().numpy()
        q = out.logits["ctc"][row, :length].softmax(-1).numpy()
        expected += sum(1 - np.corrcoef(p[t], q[t])[0, 1] for t in range(length))
        expected += length * np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(VOCAB_SIZE)])
    assert value(make("dist"), out, targets) == pytest.approx(expected, rel=1e-3)
