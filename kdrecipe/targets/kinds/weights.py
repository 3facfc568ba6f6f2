"""Frames as weighted means of other frames.

B utterances, T frames there are, N frames there will be, M of those that one is made of, X whatever a frame
holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FrameWeights:
    """For each of N frames, the M frames that it is made of.

    Args:
        frames_BNM: int64, which; any where the weight is 0.
        weights_BNM: float32, adding up to 1 on the valid frames.
        lens_B: int64, valid frames of the N.
    """

    frames_BNM: Tensor
    weights_BNM: Tensor
    lens_B: Tensor

    def mean(self, values_BTX: Tensor) -> Tensor:
        """(B, T, X) to (B, N, X)."""
        batch, length, _ = values_BTX.shape
        size = self.frames_BNM.shape[1:]
        at_BNM = self.frames_BNM.clamp(0, max(0, length - 1)).flatten(1)
        picked = values_BTX.gather(1, at_BNM[..., None].expand(-1, -1, values_BTX.shape[-1]))
        picked_BNMX = picked.reshape(batch, *size, -1)
        return (picked_BNMX * self.weights_BNM[..., None]).sum(2)
