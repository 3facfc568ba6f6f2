"""Parts that encoders and heads share. B utterances, T frames, H heads, d width of a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrecipe.interfaces import Part, UnitGroup

MASKED = -3e4  # finite, also in fp16: an utterance without frames must give no NaN


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores: 0 where ``mask`` (bool) is True, else very little."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, MASKED)


class Dropout(nn.Module):
    """Dropout from random bytes: on a CPU the usual one spends its time on random floats.

    Args:
        p: share of values set to zero, in [0, 1); rounded to a multiple of 1/256. The others are
            scaled by what the rounded share asks for, so the expectation is exact.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.threshold = round(p * 256)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape; the same shape and dtype."""
        if not self.training or self.threshold == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        # 8 values from each random integer; the full range, or the top byte would be lopsided
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        # compared in place: the comparison that makes a new bool tensor is 40 times slower
        keep = words.view(torch.uint8)[: x.numel()].ge_(self.threshold)
        return x * keep.view(x.shape).to(x.dtype).mul_(256 / (256 - self.threshold))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of (B, H, U, d) queries to (B, H, T, d) keys and values.

    ``bias`` is added to the scores, (B, 1, 1, T) or (B, 1, U, T); None: nothing.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused attention knows no bf16 products on CPUs: plain ones take half the time
        if bias is None:
            bias = q.new_zeros(1)
        else:
            bias = bias.expand(*q.shape[:2], -1, -1).flatten(0, 1)
        scores = torch.baddbmm(
            bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5
        )
        y = scores.softmax(-1, dtype=q.dtype) @ v.flatten(0, 1)
        return y.view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class FeedForward(nn.Sequential):
    """Norm, linear, activation (by default SiLU), linear: (B, T, D) to (B, T, D)."""

    def __init__(self, dim: int, ff_dim: int, dropout: float, activation: nn.Module | None = None) -> None:
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, ff_dim),
            activation or nn.SiLU(),
            Dropout(dropout),
            nn.Linear(ff_dim, dim),
        )

    def unit_group(self, path: str) -> UnitGroup:
        """Its inner units; it stands at ``path``."""
        parts = (Part(f"{path}.1", "out"), Part(f"{path}.4", "in"))
        inner: Any = self[4]
        return UnitGroup(path, "units", inner.in_features, parts)

    @staticmethod
    def on_stream(path: str) -> tuple[Part, ...]:
        """Where it reads and writes the stream that it is added to."""
        return Part(f"{path}.0", "out"), Part(f"{path}.1", "in"), Part(f"{path}.4", "out")
