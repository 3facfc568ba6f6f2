"""SpecAugment: only valid frames, the fill value, its bounds, determinism."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.recipe.sections import SpecAugment
from kdrecipe.train.spec_augment import spec_augment

FILL = torch.arange(20.0) + 100
LENS = torch.tensor([200, 120, 37, 1])


def masked(options, seed=0, lens=LENS):
    features = torch.randn(len(lens), int(lens.max()), 20, generator=torch.Generator().manual_seed(1))
    result = spec_augment(features, lens, options, FILL, torch.Generator().manual_seed(seed))
    return features, result


@settings(deadline=None, max_examples=40)
@given(
    st.builds(
        SpecAugment,
        num_freq_masks=st.integers(0, 3),
        freq_width=st.integers(0, 30),
        num_time_masks=st.integers(0, 12),
        time_width=st.integers(0, 300),
        max_time_fraction=st.floats(0, 1),
    ),
    st.integers(0, 1000),
)
def test_bounds_hold(options, seed):
    features, result = masked(options, seed)
    changed = result != features
    for row, length in enumerate(LENS.tolist()):
        assert not changed[row, length:].any()
        whole_frames = changed[row, :length].all(1)
        bands = changed[row, :length].all(0)
        allowed = options.max_time_fraction * length
        if not bands.all():
            assert whole_frames.sum() <= min(allowed, options.num_time_masks * options.time_width)
        if not whole_frames.all():
            assert bands.sum() <= options.num_freq_masks * options.freq_width
        # nothing but whole frames and whole bands
        expected = whole_frames.unsqueeze(1) | bands.unsqueeze(0)
        assert torch.equal(changed[row, :length], expected)
    assert torch.equal(result[changed], FILL.expand_as(result)[changed])


def test_equal_generators_give_equal_masks_and_utterances_get_their_own():
    options = SpecAugment()
    assert torch.equal(masked(options, 3)[1], masked(options, 3)[1])
    assert not torch.equal(masked(options, 3)[1], masked(options, 4)[1])
    features, result = masked(options, 3, torch.tensor([200, 200]))
    changed = result != features
    assert not torch.equal(changed[0], changed[1])


def test_the_input_stays_and_masks_do_occur():
    features = torch.zeros(8, 300, 20)
    lens = torch.full((8,), 300)
    options = SpecAugment(num_freq_masks=2, freq_width=10, num_time_masks=4, max_time_fraction=0.4)
    result = spec_augment(features, lens, options, FILL, torch.Generator().manual_seed(0))
    assert (features == 0).all()
    share = (result != 0).float().mean()
    assert 0.3 < share < 0.7
