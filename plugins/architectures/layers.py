"""Parts that encoders share. B utterances, T frames, F bins, C channels, D width, H heads, K kernel.

Every pointwise map is an ``nn.Linear``, so that int8 quantisation of matrix products covers it.
Norms are LayerNorm: no running statistics, and padding can't reach valid frames through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Part, Tap, UnitGroup
from kdrecipe.layers import Dropout, attend, attention_bias


class ConvFront(nn.Module):
    """Two 3x3 convolutions with stride 2, then a linear map: a quarter of the frames, width D.

    In time, the convolutions reach forward only, and the first has no bias: zeros beyond an
    utterance's end stay zeros, so one mask on the features keeps padding away from valid frames.

    Args:
        num_bins: F.
        dim: D.
        channels: of the convolutions; few, since on a CPU they cost more than the layers above.
        dropout: after the linear map.
    """

    def __init__(self, num_bins: int, dim: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=(0, 1), bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=(0, 1))
        self.proj = nn.Linear(channels * ConvFront.output_len(num_bins), dim)
        self.dropout = Dropout(dropout)
        # on a CPU half the time of the usual layout, and the bins end up beside their channels
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def unit_group(self, path: str) -> UnitGroup:
        """Channels of the second convolution; it stands at ``path``."""
        channels = self.conv2.out_channels
        bins = (1,) * (self.proj.in_features // channels)
        return UnitGroup(
            path, "channels", channels, (Part(f"{path}.conv2", "out"), Part(f"{path}.proj", "in", bins))
        )

    @staticmethod
    def output_len(num_frames: int) -> int:
        """Frames that come out of ``num_frames``: a quarter, rounded up."""
        return (num_frames + 3) // 4

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, ceil(T/4), D) and the lengths that go with it."""
        padding_BT = ~frame_mask(lens_B, features_BTF.shape[1])
        x = features_BTF.masked_fill(padding_BT.unsqueeze(2), 0.0)
        # 6 zeros after the end: 2 for the first convolution's window, 2 * 2 for the second's
        x = F.pad(x, (0, 0, 0, 6)).unsqueeze(1).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        x = self.proj(x.permute(0, 2, 3, 1).flatten(2))
        return self.dropout(x), torch.div(lens_B + 3, 4, rounding_mode="floor")


class RotaryPositions(nn.Module):
    """Rotary position embeddings (Su et al. 2021, arXiv 2104.09864): the angles.

    Args:
        dim: D, of all heads together.
        num_heads: H.
    """

    frequencies_D: Tensor

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        head_dim = dim // num_heads
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        # once per head of the queries, once per head of the keys
        self.register_buffer("frequencies_D", frequencies.repeat(2 * num_heads), persistent=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) cosines and sines for the frames of ``x_BTD``."""
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device, dtype=torch.float32)
        angles_TD = positions_T.unsqueeze(1) * self.frequencies_D
        return angles_TD.cos(), angles_TD.sin()


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Args:
        dim: D, a multiple of ``2 * num_heads``.
        num_heads: H.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()  # see taps()

    @property
    def num_heads(self) -> int:
        """H."""
        return int(self.out.in_features) // self.head_dim

    def taps(self, name: str) -> dict[str, Tap]:
        """Queries and keys as they are multiplied, values, after the name of the layer."""
        dim = self.out.in_features
        return {f"{name}.{x}": Tap(getattr(self, x), dim) for x in "qkv"}

    def unit_group(self, path: str) -> UnitGroup:
        """Its heads; it stands at ``path``."""
        half, whole = self.head_dim // 2, self.head_dim
        blocks = (half, half, half, half, whole)  # see forward()
        parts = (Part(f"{path}.qkv", "out", blocks), Part(f"{path}.out", "in", (whole,)))
        return UnitGroup(path, "heads", self.num_heads, parts)

    @staticmethod
    def on_stream(path: str) -> tuple[Part, ...]:
        """Where it reads and writes the stream."""
        return Part(f"{path}.qkv", "in"), Part(f"{path}.out", "out")

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) to (B, T, D); ``positions`` from :class:`RotaryPositions`."""
        # first: the first halves of all heads' queries, then of all keys; second: their second
        # halves. Rotation turns each value of the one with its partner in the other.
        first, second, v = self.qkv(x_BTD).chunk(3, dim=-1)
        # alike for all heads, of which there may be fewer than there were
        cos, sin = (y[:, : self.out.in_features].to(v.dtype) for y in positions)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2)
        qk = turned.unflatten(-1, (2, -1, self.head_dim // 2)).permute(3, 0, 4, 1, 2, 5).flatten(4)
        q, k = self.q(qk[0]), self.k(qk[1])
        v = self.v(v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        y = attend(q, k, v, attention_bias(mask_BT, v.dtype)[:, None, None, :])
        y_BTD: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return y_BTD


def depthwise_conv(dim: int, kernel_size: int) -> nn.Conv2d:
    """A convolution over time, each of D channels for itself; K odd. See :func:`along_time`."""
    conv = nn.Conv2d(dim, dim, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=dim)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def along_time(conv: nn.Conv2d, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """:func:`depthwise_conv` of (B, T, D), to (B, T, D); frames beyond the mask count as zeros."""
    x = x_BTD.masked_fill(~mask_BT.unsqueeze(2), 0.0)
    # as a 2-d convolution over (T, 1), whose channels-last layout is (B, T, D) itself
    return conv(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)  # type: ignore[no-any-return]


class ConvModule(nn.Module):
    """The Conformer's convolution module, with LayerNorm instead of BatchNorm.

    Args:
        dim: D.
        kernel_size: K, odd.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.depthwise = depthwise_conv(dim, kernel_size)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); frames beyond the mask don't reach valid ones."""
        x = F.glu(self.expand(self.norm_in(x_BTD)), dim=-1)
        y_BTD: Tensor = self.out(F.silu(self.norm(along_time(self.depthwise, x, mask_BT))))
        return y_BTD

    def unit_group(self, path: str) -> UnitGroup:
        """Its channels; it stands at ``path``."""
        parts = (
            Part(f"{path}.expand", "out", (1, 1)),
            Part(f"{path}.depthwise", "out"),
            Part(f"{path}.norm", "out"),
            Part(f"{path}.out", "in"),
        )
        return UnitGroup(path, "channels", self.out.in_features, parts)

    @staticmethod
    def on_stream(path: str) -> tuple[Part, ...]:
        """Where it reads and writes the stream."""
        return Part(f"{path}.norm_in", "out"), Part(f"{path}.expand", "in"), Part(f"{path}.out", "out")
