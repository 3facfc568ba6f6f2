"""Hidden states. B utterances, T frames (or tokens), D width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrecipe.errors import DataError
from kdrecipe.interfaces import Batch, Hidden, ModelOutput, TargetSpec
from kdrecipe.targets.kinds.storing import array, as_stored, padded

if TYPE_CHECKING:
    from kdrecipe.targets.kinds.weights import FrameWeights


class HiddenStates:
    """``hidden``: what is at a tap that goes by frames."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Hidden:
        return Hidden(out.taps[spec.tap], out.lens_B)

    def rounded(self, item: Hidden, spec: TargetSpec) -> Hidden:
        return Hidden(as_stored(item.values_BTD, item.lens_B, spec.dtype), item.lens_B)

    def parts(self, item: Hidden, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        return {"values": array(item.values_BTD, row, int(item.lens_B[row]), spec.dtype)}

    def collated(self, rows: Sequence[Any]) -> Hidden:
        values = [row["values"] for row in rows]
        return Hidden(padded(values), torch.tensor([len(v) for v in values]))

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        """As it was before."""
        return before

    def weighted(self, item: Hidden, weights: FrameWeights) -> Hidden:
        return Hidden(weights.mean(item.values_BTD), weights.lens_B)


class TokenHiddenStates(HiddenStates):
    """``token_hidden``: what is at a tap of a decoder, at every token of a text and at its end."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Hidden:
        return Hidden(out.taps[spec.tap], batch.token_lens_B + 1)

    def weighted(self, item: Hidden, weights: FrameWeights) -> Hidden:
        raise DataError("token_hidden goes by tokens, not by frames: there is nothing to align")
