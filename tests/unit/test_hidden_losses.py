"""Losses between hidden states against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import valid_frames
from kdrecipe.interfaces import Hidden, LossSetup, ModelOutput, Posteriors, Targets, TargetSpec
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import loss_setup, model_info, random_batch, random_output, targets_like
from kdrecipe_plugins.losses.hidden import FitnetsHint, HiddenL1Cos, HiddenMse, HiddenWeighted

LENS = (9, 6, 7)
BATCH = random_batch()
ONE_PAIR = {"layers": {"encoder.0": "encoder.0"}}
TWO_PAIRS = {"layers": {"encoder.0": "encoder.3", "encoder.1": "encoder.3"}}
WIDE = LossSetup(model_info(width=4), model_info(width=7))
LOSSES = (HiddenMse, HiddenL1Cos, FitnetsHint, HiddenWeighted)

each = pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.name)
quick = settings(max_examples=10, deadline=None)


def make(cls, setup=None, **options):
    return cls(cls.Config(**options), setup or loss_setup())


def pair(loss, seed=0, setup=None):
    setup = setup or loss_setup()
    out = random_output(LENS, taps=loss.taps, info=setup.student, seed=seed)
    return out, targets_like(out, loss.requires(loss.config), teacher=setup.teacher, seed=seed + 1)


def one(student, teacher, blanks=None):
    """Output and targets of one utterance, at encoder.0."""
    lens_B = torch.tensor([len(student)])
    out = ModelOutput(torch.zeros(1, len(student), 2), lens_B, taps={"encoder.0": torch.tensor([student])})
    items = {"hidden:encoder.0": Hidden(torch.tensor([teacher]), lens_B)}
    if blanks is not None:
        p = torch.tensor([[[b, (1 - b) / 2, (1 - b) / 2] for b in blanks]])
        items["frame_logits:ctc"] = Posteriors(p.log(), lens_B)
    return out, Targets(items)


# ---------------------------------------------------------------- all of them

CONTRACTS = {
    "hidden_mse-projected": loss_contract(HiddenMse, TWO_PAIRS, setup=WIDE),
    "hidden_l1_cos-projected": loss_contract(HiddenL1Cos, TWO_PAIRS, setup=WIDE),
    "hidden_l1_cos-raw": loss_contract(HiddenL1Cos, {**ONE_PAIR, "cosine": "raw", "cos_weight": 0.5}),
    "fitnets_hint-projected": loss_contract(FitnetsHint, {**TWO_PAIRS, "kernel": 5}, setup=WIDE),
    "hidden_weighted-projected": loss_contract(HiddenWeighted, {**TWO_PAIRS, "top_k": None}, setup=WIDE),
    "hidden_mse-normalised": loss_contract(
        HiddenMse,
        {**TWO_PAIRS, "normalise": True},
        expected_failed_checks={"minimum_at_teacher": "the target is scaled"},
    ),
}
CHECKS = [(name, check) for name, contract in CONTRACTS.items() for check in contract.bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


@each
@quick
@given(st.integers(0, 10_000))
def test_an_utterance_does_not_depend_on_its_neighbours(cls, seed):
    loss = make(cls, WIDE, **TWO_PAIRS)
    out, targets = pair(loss, seed, WIDE)
    rows = [torch.arange(len(LENS)) == row for row in range(len(LENS))]
    alone = [
        float(loss(out.select(row_B), targets.map(lambda x, row_B=row_B: x[row_B]), BATCH).total.detach())
        for row_B in rows
    ]
    assert float(loss(out, targets, BATCH).total.detach()) == pytest.approx(sum(alone), rel=1e-4)
    assert int(loss(out, targets, BATCH).count) == 2 * sum(LENS)


@each
def test_its_own_weights_learn_a_target_that_they_can_reach(cls):
    setup = LossSetup(model_info(width=4), model_info(width=10))
    loss = make(cls, setup, **ONE_PAIR)
    assert {tuple(p.shape) for p in loss.parameters()} >= {(10,)}
    out, targets = pair(loss, setup=setup)
    values = out.taps["encoder.0"] @ torch.randn(4, 10)
    targets = replace(targets, items={**targets.items, "hidden:encoder.0": Hidden(values, out.lens_B)})
    optimizer, first = torch.optim.Adam(loss.parameters(), lr=0.1), None
    for _ in range(150):
        optimizer.zero_grad()
        result = loss(out, targets, BATCH)
        result.total.backward()
        first = first or float(result.total.detach())
        optimizer.step()
    least = -math.log(1 / (1 + math.exp(-1))) * sum(LENS) if cls is HiddenL1Cos else 0.0
    assert float(result.total.detach()) - least < 0.1 * (first - least)


@each
def test_misaligned_frames_and_unknown_taps_are_refused(cls):
    loss = make(cls, **ONE_PAIR)
    out, targets = pair(loss)
    short = {**targets.items, "hidden:encoder.0": replace(targets.hidden("encoder.0"), lens_B=out.lens_B - 1)}
    with pytest.raises(DataError, match="other frame counts"):
        loss(out, replace(targets, items=short), BATCH)
    with pytest.raises(RecipeError, match=rf"{cls.name}: the student declares no tap 'encoder\.99'"):
        make(cls, layers={"encoder.99": "encoder.0"})
    with pytest.raises(RecipeError, match=r"teacher declares no tap 'encodr\.1'[\s\S]*encoder\.1"):
        make(cls, layers={"encoder.0": "encodr.1"})


# ---------------------------------------------------------------- each against its formula


def test_hidden_l1_cos():
    out, targets = one([[1.0, 2.0], [0.0, -1.0]], [[2.0, 2.0], [3.0, 4.0]])
    first, second = 6 / math.sqrt(5 * 8), -4 / 5  # cosines
    sigmoid = [1 / (1 + math.exp(-cos)) for cos in (first, second)]
    want = (1 + 0) / 2 + (3 + 5) / 2 - sum(map(math.log, sigmoid))
    assert float(make(HiddenL1Cos, **ONE_PAIR)(out, targets, BATCH).total) == pytest.approx(want)
    raw = make(HiddenL1Cos, **ONE_PAIR, cosine="raw", cos_weight=2.0)(out, targets, BATCH).total
    assert float(raw) == pytest.approx(0.5 + 4 - 2 * (first + second))


def test_hidden_weighted():
    out, targets = one([[1.0, 2.0], [0.0, -1.0]], [[2.0, 2.0], [3.0, 4.0]], blanks=[0.9, 0.25])
    result = make(HiddenWeighted, **ONE_PAIR)(out, targets, BATCH)
    assert float(result.total) == pytest.approx(0.1 * 0.5 + 0.75 * 17)
    assert int(result.count) == 2
    specs = HiddenWeighted.requires(HiddenWeighted.Config(**TWO_PAIRS, align="mean"))
    assert specs == [
        TargetSpec("hidden", "encoder.3", align="mean"),
        TargetSpec("frame_logits", "ctc", top_k=4, align="mean"),
    ]


def test_fitnets_hint():
    loss = make(FitnetsHint, layers={"encoder.0": "encoder.0"})
    out, targets = pair(loss)
    (conv,) = loss.projections
    want = 0.0
    for row, length in enumerate(LENS):
        padded = torch.cat([torch.zeros(1, 4), out.taps["encoder.0"][row, :length], torch.zeros(1, 4)])
        for t in range(length):
            seen = padded[t : t + 3]  # (3, D): frames t - 1 to t + 1
            guess = torch.einsum("odk,kd->o", conv.weight, seen) + conv.bias
            target = targets.hidden("encoder.0").values_BTD[row, t]
            want += float(((guess - target) ** 2).mean() / 2)
    assert float(loss(out, targets, BATCH).total.detach()) == pytest.approx(want, rel=1e-4)


def test_a_regressor_is_centred_on_a_frame():
    with pytest.raises(ValueError, match="kernel: 4 is even"):
        FitnetsHint.Config(**ONE_PAIR, kernel=4)


def test_hidden_mse_is_the_mean_over_d_summed_over_frames_and_pairs():
    layers = {"encoder.0": "encoder.2", "encoder.1": "encoder.5"}
    loss = make(HiddenMse, layers=layers)
    out = random_output(LENS, taps=loss.taps)
    targets = targets_like(out, HiddenMse.requires(loss.config))
    result = loss(out, targets, BATCH)
    want = 0.0
    for student, teacher in layers.items():
        difference = out.taps[student] - targets.hidden(teacher).values_BTD
        want += float(valid_frames(difference.square().mean(-1), out.lens_B).sum())
    assert float(result.total) == pytest.approx(want, rel=1e-5)
    assert int(result.count) == 2 * sum(LENS)


def test_hidden_mse_learns_a_projection_where_widths_differ():
    setup = LossSetup(model_info(width=4), model_info(width=10))
    loss = make(HiddenMse, setup, layers={"encoder.0": "encoder.0"})
    assert [p.shape for p in loss.parameters()] == [(10, 4), (10,)]
    out = random_output(LENS, taps=loss.taps)
    values = out.taps["encoder.0"] @ torch.randn(4, 10)  # a target that a linear map can reach
    targets = Targets({"hidden:encoder.0": Hidden(values, out.lens_B)})
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        result = loss(out, targets, BATCH)
        result.total.backward()
        optimizer.step()
    assert float(result.total.detach()) / int(result.count) < 0.05


def test_normalised_targets_do_not_care_about_the_teachers_scale():
    loss = make(HiddenMse, layers={"encoder.0": "encoder.0"}, normalise=True)
    out = random_output(LENS, taps=loss.taps)
    targets = targets_like(out, HiddenMse.requires(loss.config))
    loud = targets.map(lambda x: 50 * x + 3 if x.is_floating_point() else x)
    got, want = (float(loss(out, t, BATCH).total) for t in (loud, targets))
    assert got == pytest.approx(want, rel=1e-3)


def test_unknown_taps_are_refused_with_a_hint():
    with pytest.raises(RecipeError, match=r"student declares no tap 'encoder\.99'"):
        make(HiddenMse, layers={"encoder.99": "encoder.0"})
    with pytest.raises(RecipeError, match=r"teacher declares no tap 'encodr\.1'[\s\S]*encoder\.1"):
        make(HiddenMse, layers={"encoder.0": "encodr.1"})


def test_a_students_tap_must_have_the_frames_of_its_output():
    student = replace(model_info(), tap_shifts_s={"encoder.0": 0.02})
    cls = HiddenMse
    with pytest.raises(
        RecipeError, match=r"'encoder\.0' has a frame every 0\.02 s, its output every 0\.04 s"
    ):
        cls(cls.Config(layers={"encoder.0": "encoder.0"}), LossSetup(student, model_info()))
    cls(cls.Config(layers={"encoder.1": "encoder.0"}), LossSetup(student, model_info()))
