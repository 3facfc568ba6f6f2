"""Codebooks of a teacher's hidden states: trained, stored, predicted."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import CODEBOOK_SIZE, Codes, LossSetup, ModelOutput, Targets, TargetSpec
from kdrecipe.targets.align import frame_weights
from kdrecipe.targets.kinds import kind_of
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.targets.quantiser import CodedTeacher, Quantiser, from_state, state_of, train_quantiser
from kdrecipe.testing.models import loss_setup, model_info, random_batch, tiny_model
from kdrecipe_plugins.losses.mvq import Mvq

NEED = TargetSpec("codebooks", "encoder.1", 2, 0.04)


def small(num_codebooks=2, size=4, dim=3, seed=0):
    torch.manual_seed(seed)
    return Quantiser(dim, num_codebooks, size)


def test_refinement_comes_no_further_away_and_ends_where_no_single_change_helps():
    quantiser, x = small(3, 4, 5), torch.randn(50, 5)
    errors = [(quantiser.decode(quantiser.encode(x, n)) - x).square().sum(1) for n in (0, 1, 2, 20)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before + 1e-5).all()
    codes = quantiser.encode(x, 20)
    for n in range(3):
        for k in range(4):
            other = codes.clone()
            other[:, n] = k
            assert ((quantiser.decode(other) - x).square().sum(1) >= errors[-1] - 1e-5).all()


def test_of_one_codebook_it_is_the_nearest_entry():
    quantiser, x = small(1, 8, 5), torch.randn(50, 5)
    distances = (x[:, None] - quantiser.entries_NKD[0]).square().sum(-1)
    assert torch.equal(quantiser.encode(x)[:, 0], distances.argmin(1))


def test_pairs_of_codebooks_stand_for_the_same_vectors():
    quantiser = small(4, 4, 5)
    quantiser.mean_D.copy_(torch.randn(5))
    quantiser.scale.fill_(2.0)
    paired = quantiser.of_pairs()
    codes = torch.randint(4, (20, 4))
    both = codes[:, ::2] * 4 + codes[:, 1::2]
    torch.testing.assert_close(paired.decode(both), quantiser.decode(codes))
    x = torch.randn(20, 5)
    logits, wide = quantiser._logits(x), paired._logits(x)
    torch.testing.assert_close(wide[:, 0, 4 * 2 + 3], logits[:, 0, 2] + logits[:, 1, 3])


def test_training_finds_what_frames_are_made_of():
    """Frames that are sums of one of 16 vectors and one of another 16: two codebooks can say all of it."""
    rng = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 16, 8, generator=rng)
    codes = torch.randint(16, (4000, 2), generator=rng)
    frames = parts[0, codes[:, 0]] + parts[1, codes[:, 1]] + 5.0
    quantiser, error = train_quantiser(frames, 1, steps=150)
    assert error < 0.2
    assert quantiser.entries_NKD.shape == (1, CODEBOOK_SIZE, 8)
    untrained = Quantiser(8, 1)
    untrained.mean_D.copy_(quantiser.mean_D)
    untrained.scale.copy_(quantiser.scale)
    rest = (untrained.decode(untrained.encode(frames)) - frames).square().sum()
    found = (quantiser.decode(quantiser.encode(frames)) - frames).square().sum()
    assert found < 0.5 * rest
    again, _ = train_quantiser(frames, 1, steps=150)
    assert torch.equal(again.entries_NKD, quantiser.entries_NKD)
    copied = from_state(state_of(quantiser))
    assert torch.equal(copied.encode(frames[:9]), quantiser.encode(frames[:9]))


# ---------------------------------------------------------------- targets


def coded():
    return CodedTeacher(ModelTeacher(tiny_model()), {NEED.key: Quantiser(4, 2)})


def test_a_teacher_gives_the_indices_of_its_hidden_states():
    batch, teacher = random_batch(), coded()
    found = LiveTargets(teacher, [NEED]).targets(batch).codes("encoder.1", 2)
    hidden = ModelTeacher(tiny_model()).targets(batch, [NEED.source]).hidden("encoder.1")
    assert found.lens_B.tolist() == hidden.lens_B.tolist() == [8, 6, 4]
    quantiser = teacher._quantisers[NEED.key]
    for row, length in enumerate(found.lens_B.tolist()):
        want = quantiser.encode(hidden.values_BTD[row, :length])
        assert torch.equal(found.indices_BTN[row, :length], want)
        assert not found.indices_BTN[row, length:].any()


def test_an_index_is_a_byte_on_disk_and_comes_back():
    kind = kind_of(NEED)
    item = kind.rounded(Codes(torch.randint(CODEBOOK_SIZE, (2, 5, 2)), torch.tensor([5, 3])), NEED)
    stored = [kind.parts(item, row, NEED) for row in range(2)]
    assert [s["codes"].dtype for s in stored] == [np.uint8] * 2
    assert sum(s["codes"].nbytes for s in stored) == 8 * 2
    again = kind.collated(stored)
    assert torch.equal(again.indices_BTN, item.indices_BTN)
    assert again.lens_B.tolist() == [5, 3]


def test_of_several_frames_the_middle_one_is_taken_and_none_is_averaged():
    item = Codes(torch.arange(12).view(1, 6, 2), torch.tensor([6]))
    lens = torch.tensor([3])
    found = kind_of(NEED).weighted(item, frame_weights("stride", 2.0, item.lens_B, lens))
    assert found.indices_BTN[0, :, 0].tolist() == [0, 4, 8]
    with pytest.raises(DataError, match="no mean"):
        kind_of(NEED).weighted(item, frame_weights("mean", 2.0, item.lens_B, lens))


def test_what_teachers_offer_is_the_hidden_state():
    offered = {s.key: s for s in model_info().provides()}
    need = TargetSpec("codebooks", "encoder.5", 8)
    assert need.key == "codebooks:encoder.5x8"
    gives = need.among(offered)
    assert (gives.kind, gives.dim, gives.frame_shift_s) == ("codebooks", 8, 0.04)
    assert model_info().pinned(need).mismatch(gives) is None
    assert TargetSpec("codebooks", "encoder.99", 8).among(offered) is None


# ---------------------------------------------------------------- loss


def test_it_is_the_cross_entropy_summed_over_codebooks():
    lens_B = torch.tensor([2])
    loss = Mvq(Mvq.Config(layer="encoder.1", num_codebooks=2), loss_setup())
    with torch.no_grad():
        loss.classifier.weight.zero_()
        loss.classifier.bias.zero_()
        loss.classifier.bias[7] = math.log(5.0)  # entry 7 of the first codebook
    codes = torch.tensor([[[7, 1], [0, 200]]])
    out = ModelOutput(torch.randn(1, 3, 4), lens_B)
    result = loss(out, Targets({"codebooks:encoder.1x2": Codes(codes, lens_B)}), random_batch())
    first = -math.log(5 / 260) - math.log(1 / 260)  # 5 + 255 ones
    assert result.total.item() == pytest.approx(first + 2 * math.log(256), rel=1e-5)
    assert int(result.count) == 2
    assert float(result.metrics["right"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_layer": "encoder.99"}, "no tap 'encoder.99'"),
        ({"student_layer": "slow"}, "a frame every 0.02"),
    ],
)
def test_taps_that_do_not_serve(options, message):
    info = model_info()
    info = type(info)(**{**vars(info), "taps": {**info.taps, "slow": 4}, "tap_shifts_s": {"slow": 0.02}})
    with pytest.raises(RecipeError, match=message):
        Mvq(Mvq.Config(layer="encoder.1", **options), LossSetup(info, info))
