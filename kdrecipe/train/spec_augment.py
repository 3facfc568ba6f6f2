"""SpecAugment (Park et al. 2019, arXiv 1904.08779) without time warping: bands and stretches
of the features replaced by the training set's mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrecipe.frames import frame_mask

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import SpecAugment


def spec_augment(
    features_BTF: Tensor, lens_B: Tensor, options: SpecAugment, fill_F: Tensor, generator: torch.Generator
) -> Tensor:
    """A masked copy of a batch; padding stays as it is.

    Every utterance gets its own masks. A band's width is uniform in 0...``freq_width``; a stretch's
    in 0...``time_width``, or up to ``max_time_fraction`` * length / ``num_time_masks`` where that is
    less; positions are uniform where they fit.

    Args:
        features_BTF: log-mel features.
        lens_B: valid frames.
        options: the recipe's ``training.spec_augment``.
        fill_F: what masked values become.
        generator: on the CPU; equal states give equal masks on every device.
    """
    size, num_frames, num_bins = features_BTF.shape
    lens_B1 = lens_B.cpu().unsqueeze(1).double()
    share_B1 = options.max_time_fraction * lens_B1 / max(options.num_time_masks, 1)
    widest_B1 = share_B1.clamp(max=options.time_width)
    time_BT = _masks(lens_B1, widest_B1, options.num_time_masks, num_frames, generator)
    bins_B1 = torch.full((size, 1), float(num_bins), dtype=torch.float64)
    band_B1 = bins_B1.clamp(max=options.freq_width)
    band_BF = _masks(bins_B1, band_B1, options.num_freq_masks, num_bins, generator)
    valid_BT = frame_mask(lens_B.cpu(), num_frames)
    masked_BTF = (time_BT.unsqueeze(2) | band_BF.unsqueeze(1)) & valid_BT.unsqueeze(2)
    return torch.where(masked_BTF.to(features_BTF.device), fill_F.to(features_BTF), features_BTF)


def _masks(lens_B1: Tensor, widest_B1: Tensor, number: int, size: int, generator: torch.Generator) -> Tensor:
    """Bool (B, size): True within ``number`` random intervals inside each row's length."""
    draws = torch.rand(2, len(lens_B1), number, dtype=torch.float64, generator=generator)
    widths = (draws[0] * (widest_B1.floor() + 1)).floor()
    starts = (draws[1] * (lens_B1 - widths + 1)).floor()
    places = torch.arange(size)
    inside = (places >= starts.unsqueeze(2)) & (places < (starts + widths).unsqueeze(2))
    return inside.any(1)
