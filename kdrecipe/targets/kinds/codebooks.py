"""Codebook indices. B utterances, T frames, N codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrecipe.errors import DataError
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Batch, Codes, ModelOutput, TargetSpec
from kdrecipe.targets.kinds.storing import array, padded

if TYPE_CHECKING:
    from kdrecipe.targets.kinds.weights import FrameWeights


class Codebooks:
    """``codebooks``: hidden states as indices, a byte for each codebook; see
    :mod:`kdrecipe.targets.quantiser`."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Codes:
        raise DataError(f"{spec.key} needs codebooks that are trained on the teacher's hidden states")

    def rounded(self, item: Codes, spec: TargetSpec) -> Codes:
        length = int(item.lens_B.max()) if len(item.lens_B) else 0
        valid_BT1 = frame_mask(item.lens_B, length)[..., None]
        return Codes(item.indices_BTN[:, :length].masked_fill(~valid_BT1, 0), item.lens_B)

    def parts(self, item: Codes, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        return {"codes": array(item.indices_BTN, row, int(item.lens_B[row]), "uint8")}

    def collated(self, rows: Sequence[Any]) -> Codes:
        codes = [row["codes"] for row in rows]
        return Codes(padded(codes), torch.tensor([len(c) for c in codes]))

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        """As it was before."""
        return before

    def weighted(self, item: Codes, weights: FrameWeights) -> Codes:
        if weights.frames_BNM.shape[-1] != 1:
            raise DataError("codebook indices have no mean", remedy="align: stride")
        at_BN1 = weights.frames_BNM.clamp(0, max(0, item.indices_BTN.shape[1] - 1))
        picked = item.indices_BTN.gather(1, at_BN1.expand(-1, -1, item.indices_BTN.shape[-1]))
        return Codes(picked, weights.lens_B)
