"""Posteriors of a transducer. B utterances, T frames, P lattice positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB, frame_mask
from kdrecipe.interfaces import Batch, LatticePosteriors, ModelOutput, TargetSpec
from kdrecipe.lattice import full_lattice_posteriors
from kdrecipe.targets.kinds.storing import array, as_stored, padded

if TYPE_CHECKING:
    from kdrecipe.targets.kinds.weights import FrameWeights


class Lattices:
    """``rnnt_lattice``: the next token and the blank at every frame and position."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> LatticePosteriors:
        return full_lattice_posteriors(out.lattices[spec.tap])

    def rounded(self, item: LatticePosteriors, spec: TargetSpec) -> LatticePosteriors:
        """Beyond the last position all is 0, and so is the last position's next token."""
        values = as_stored(item.log_probs_BTP2.clamp(min=MIN_LOG_PROB), item.lens_B, spec.dtype)
        positions_BP = frame_mask(item.token_lens_B + 1, values.shape[2])
        has_next_BP = frame_mask(item.token_lens_B, values.shape[2])
        means_BP2 = torch.stack([has_next_BP, positions_BP], dim=-1)
        return LatticePosteriors(values.masked_fill(~means_BP2[:, None], 0.0), item.lens_B, item.token_lens_B)

    def parts(self, item: LatticePosteriors, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        positions = int(item.token_lens_B[row]) + 1
        values = item.log_probs_BTP2[:, :, :positions]
        return {"log_probs": array(values, row, int(item.lens_B[row]), spec.dtype)}

    def collated(self, rows: Sequence[Any]) -> LatticePosteriors:
        values = [row["log_probs"] for row in rows]
        lens_B = torch.tensor([len(v) for v in values])
        return LatticePosteriors(padded(values), lens_B, torch.tensor([v.shape[1] - 1 for v in values]))

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        """Blank is certain."""
        return np.array([MIN_LOG_PROB, 0.0], before.dtype)  # the next token, blank

    def weighted(self, item: LatticePosteriors, weights: FrameWeights) -> LatticePosteriors:
        raise DataError(
            "posteriors of a lattice can't be brought to other frames: a token is found at one of them",
            remedy="teacher and student need equal subsampling for rnnt_kl",
        )
