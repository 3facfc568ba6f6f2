"""Targets at one frame rate, brought to another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import MIN_LOG_PROB, keep_top
from kdrecipe.interfaces import Hidden, Posteriors, Targets, TargetSpec, whole_factor
from kdrecipe.recipe.load import load_recipe
from kdrecipe.targets.align import AlignedTargets, frame_weights
from kdrecipe.targets.kinds import KINDS
from kdrecipe.testing.models import random_batch

HIDDEN = TargetSpec("hidden", "encoder.1", frame_shift_s=0.02)
NEED = replace(HIDDEN, frame_shift_s=0.04, align="mean")


def by_hand(how, values_TD, factor, num):
    """Frame by frame, as the module says."""
    last, rows = len(values_TD) - 1, []
    for n in range(num):
        if how == "mean":
            group = [values_TD[i] for i in range(n * factor, (n + 1) * factor) if i <= last]
            rows.append(np.mean(group, axis=0) if group else values_TD[last])
        elif how == "stride":
            rows.append(values_TD[min(last, n * factor + (factor - 1) // 2)])
        else:
            at = (n + 0.5) * factor - 0.5
            low = int(np.floor(at))
            share = at - low
            a, b = values_TD[min(max(low, 0), last)], values_TD[min(max(low + 1, 0), last)]
            rows.append((1 - share) * a + share * b)
    return np.array(rows)


@given(
    how=st.sampled_from(["mean", "stride", "interpolate"]),
    factor=st.integers(1, 4),
    lens=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    change=st.integers(-1, 1),
)
def test_frames_are_made_as_the_module_says(how, factor, lens, change):
    rng = np.random.default_rng(sum(lens))
    to_lens = [max(1, round(length / factor) + change) for length in lens]
    values_BTD = rng.standard_normal((len(lens), max(lens), 3)).astype(np.float32)
    weights = frame_weights(how, factor, torch.tensor(lens), torch.tensor(to_lens))
    found = KINDS["hidden"].weighted(Hidden(torch.from_numpy(values_BTD), torch.tensor(lens)), weights)
    assert found.lens_B.tolist() == to_lens
    for row, (length, num) in enumerate(zip(lens, to_lens, strict=True)):
        want = by_hand(how, values_BTD[row, :length], factor, num)
        np.testing.assert_allclose(found.values_BTD[row, :num].numpy(), want, rtol=1e-5, atol=1e-5)


def test_interpolation_goes_between_rates_without_a_whole_factor():
    """A line stays a line: at 0.04 s, frame n is centred at 0.04 n + 0.02 s, whatever the teacher's rate."""
    times_T = (torch.arange(50) + 0.5) * 0.025
    lens_B, num_B = torch.tensor([50]), torch.tensor([31])
    weights = frame_weights("interpolate", 0.04 / 0.025, lens_B, num_B)
    found = KINDS["hidden"].weighted(Hidden(times_T[None, :, None], lens_B), weights)
    want_N = (torch.arange(31) + 0.5) * 0.04
    torch.testing.assert_close(found.values_BTD[0, :-1, 0], want_N[:-1], rtol=0, atol=1e-5)


@given(top_k=st.sampled_from([None, 1, 2, 5]), how=st.sampled_from(["mean", "interpolate", "stride"]))
def test_posteriors_stay_posteriors(top_k, how):
    torch.manual_seed(0)
    logits_BTV = 4 * torch.randn(2, 9, 6)
    lens_B, num_B = torch.tensor([9, 6]), torch.tensor([5, 3])
    exact = Posteriors(logits_BTV.log_softmax(-1), lens_B)
    weights = frame_weights(how, 2.0, lens_B, num_B)
    kind = KINDS["frame_logits"]
    found = kind.weighted(keep_top(exact, top_k), weights)
    mass = found.log_probs_BTK.exp().sum(-1)
    if found.log_tail_BT is not None:
        mass = mass + found.log_tail_BT.exp()
        assert found.log_probs_BTK.shape[-1] == top_k
    for row, num in enumerate(num_B.tolist()):
        torch.testing.assert_close(mass[row, :num], torch.ones(num))
    if top_k == 5:  # all but the least likely: what is kept is what full posteriors say, or less
        full = kind.weighted(exact, weights)
        kept = full.log_probs_BTK.gather(-1, found.indices_BTK)
        assert bool((found.log_probs_BTK[0, :5] <= kept[0, :5] + 1e-5).all())


def test_a_token_and_a_blank_are_half_each():
    log_probs = torch.tensor([[0.0, MIN_LOG_PROB], [MIN_LOG_PROB, 0.0]])[None]
    item = Posteriors(log_probs, torch.tensor([2]))
    weights = frame_weights("mean", 2.0, torch.tensor([2]), torch.tensor([1]))
    found = KINDS["frame_logits"].weighted(item, weights)
    assert found.log_probs_BTK.exp().flatten().tolist() == pytest.approx([0.5, 0.5])


class Fixed:
    """A source that gives so many frames."""

    hears_audio = True

    def __init__(self, *lens):
        self.lens_B = torch.tensor(lens)

    def targets(self, batch):
        values_BTD = torch.randn(len(self.lens_B), int(self.lens_B.max()), 2)
        return Targets({HIDDEN.key: Hidden(values_BTD, self.lens_B)})


def aligned(source, *student, need=NEED):
    lens_B = torch.tensor(student)
    return AlignedTargets(source, {HIDDEN.key: need}, {HIDDEN.key: HIDDEN}, lambda spec, batch: lens_B)


def test_a_frame_at_the_end_is_padded_or_dropped_and_counted():
    batch = random_batch([40, 40, 40])
    found = aligned(Fixed(20, 20, 20), 10, 11, 9)
    assert found.hears_audio
    assert found.targets(batch).hidden("encoder.1").lens_B.tolist() == [10, 11, 9]
    counts = found.counts[HIDDEN.key]
    assert (counts.frames, counts.padded, counts.dropped) == (30, 1, 1)
    assert list(found.said()) == [
        "hidden:encoder.1: 1 frames padded, 1 dropped at the ends of utterances, of 30"
    ]


@pytest.mark.parametrize("num", [8, 12])
def test_more_than_one_frame_is_refused(num):
    batch = random_batch([40, 40])
    with pytest.raises(DataError, match=f"the student has {num} frames, the teacher's make 10.0") as caught:
        aligned(Fixed(20, 20), 10, num).targets(batch)
    assert caught.value.problems[0].where == batch.ids[1]


def test_equal_rates_are_left_alone():
    need = replace(NEED, frame_shift_s=0.02)
    found = aligned(Fixed(20), 5, need=need)
    assert found.targets(random_batch([20])).hidden("encoder.1").lens_B.tolist() == [20]
    assert not found.counts


@pytest.mark.parametrize(
    ("align", "its", "why"),
    [
        (None, 0.02, "needs frame_shift_s 0.04, the teacher's is 0.02"),
        ("mean", 0.02, None),
        ("mean", 0.04, None),
        ("mean", 0.03, "0.04 s is 1.33 times 0.03 s"),
        ("stride", 0.08, "0.04 s is 0.5 times 0.08 s"),
        ("interpolate", 0.03, None),
        ("interpolate", 0.08, None),
    ],
)
def test_which_rates_fit(align, its, why):
    found = replace(NEED, align=align).mismatch(replace(HIDDEN, frame_shift_s=its))
    assert found is None if why is None else why in found


def test_posteriors_of_a_lattice_are_not_aligned():
    need = TargetSpec("rnnt_lattice", "rnnt", frame_shift_s=0.04, align="mean")
    assert "can't be aligned" in need.mismatch(replace(need, frame_shift_s=0.02))
    with pytest.raises(DataError, match="can't be brought to other frames"):
        KINDS["rnnt_lattice"].weighted(None, None)


def test_whole_factors():
    assert [whole_factor(x) for x in (1, 2.0, 0.04 / 0.02, 0.06 / 0.02, 0.5, 1.5)] == [1, 2, 2, 3, None, None]


TWO_WAYS = """
corpus: {name: manifests, root: /data}
tokens: {name: char}
systems:
  teacher: {train: {model: &m {name: conformer, num_layers: 2, dim: 16, num_heads: 2, heads: {ctc: {}}}}}
  other: {train: {model: *m}}
  student:
    distill:
      teachers: [teacher, other]
      model: *m
      losses:
        - {name: hidden_mse, layers: {encoder.0: encoder.1}, align: mean, teacher: teacher}
        - {name: hidden_l1_cos, layers: {encoder.1: encoder.1}, align: stride, teacher: teacher}
        - {name: kl}
"""


def test_one_target_is_not_aligned_in_two_ways(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TWO_WAYS)
    with pytest.raises(RecipeError, match=r"align: stride for hidden:encoder.1 of 'teacher'") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    [problem] = caught.value.problems
    assert "systems.student.distill.losses[1].align" in problem.what
    assert "'hidden_mse' has by mean" in problem.what
    assert problem.remedy == "give both losses the same align"
    for change in (("align: stride", "align: mean"), ("stride, teacher: teacher", "stride, teacher: other")):
        (tmp_path / "recipe.yaml").write_text(TWO_WAYS.replace(*change))
        load_recipe(tmp_path / "recipe.yaml")
