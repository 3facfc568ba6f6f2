"""What the kinds of targets share: rounding, padding, numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdrecipe.frames import frame_mask


def as_stored(values_BTX: Tensor, lens_B: Tensor, dtype: str) -> Tensor:
    """float32 (B, T, ...), T being the longest utterance's, rounded as on disk, padding 0."""
    length = int(lens_B.max()) if len(lens_B) else 0
    valid_BT = frame_mask(lens_B, length)
    valid_BTX = valid_BT.reshape(*valid_BT.shape, *[1] * (values_BTX.dim() - 2))
    rounded_BTX = values_BTX[:, :length].to(getattr(torch, dtype)).float()
    return rounded_BTX.masked_fill(~valid_BTX, 0.0)


def array(tensor_BT: Tensor, row: int, length: int, dtype: str) -> np.ndarray:
    """The first frames of one utterance."""
    return np.ascontiguousarray(tensor_BT[row, :length].cpu().numpy().astype(dtype))


def padded(arrays: Sequence[np.ndarray]) -> Tensor:
    """Arrays of like rank to one tensor, 0 behind each in every direction; float32, or int64 for integers."""
    shape = np.max([a.shape for a in arrays], axis=0)
    dtype = np.float32 if np.issubdtype(arrays[0].dtype, np.floating) else np.int64
    values = np.zeros((len(arrays), *shape), dtype)
    for row, item in zip(values, arrays, strict=True):
        row[tuple(slice(n) for n in item.shape)] = item
    return torch.from_numpy(values)
