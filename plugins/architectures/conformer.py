"""Conformer encoder (Gulati et al. 2020, arXiv 2005.08100) with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Options, Part, Tap, UnitGroup
from kdrecipe.layers import Dropout, FeedForward

from .layers import ConvFront, ConvModule, RotaryPositions, SelfAttention


class ConformerOptions(Options):
    """Options of ``name: conformer``.

    Args:
        num_layers: Conformer blocks.
        dim: width D; a multiple of ``2 * num_heads``.
        num_heads: attention heads.
        ff_dim: width within the feed-forward modules; by default 4 * ``dim``.
        kernel_size: of the depthwise convolution, odd, in frames of 0.04 s.
        dropout: share dropped after the front end and in every module.
        front_channels: channels of the front end's convolutions.
    """

    num_layers: int = Field(default=12, ge=1)
    dim: int = Field(default=256, ge=2)
    num_heads: int = Field(default=4, ge=1)
    ff_dim: int | None = Field(default=None, ge=1)
    kernel_size: int = Field(default=15, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)
    front_channels: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _shapes_fit(self) -> ConformerOptions:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 2 * num_heads = {2 * self.num_heads}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} is even; it must be odd")
        return self


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm; each but the norm residual."""

    def __init__(self, config: ConformerOptions) -> None:
        super().__init__()
        dim, ff_dim = config.dim, config.ff_dim or 4 * config.dim
        self.ff1 = FeedForward(dim, ff_dim, config.dropout)
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, config.num_heads)
        self.conv = ConvModule(dim, config.kernel_size)
        self.ff2 = FeedForward(dim, ff_dim, config.dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x_BTD.add(self.dropout(self.ff1(x_BTD)), alpha=0.5)
        x = x + self.dropout(self.attention(self.norm_attention(x), mask_BT, positions))
        x = x + self.dropout(self.conv(x, mask_BT))
        x = x.add(self.dropout(self.ff2(x)), alpha=0.5)
        y_BTD: Tensor = self.norm(x)
        return y_BTD

    def unit_groups(self, path: str) -> list[UnitGroup]:
        """What may be cut out of it; it stands at ``path``."""
        return [
            self.ff1.unit_group(f"{path}.ff1"),
            self.attention.unit_group(f"{path}.attention"),
            self.conv.unit_group(f"{path}.conv"),
            self.ff2.unit_group(f"{path}.ff2"),
        ]

    def on_stream(self, path: str) -> tuple[Part, ...]:
        """Where it reads and writes the stream."""
        return (
            *self.ff1.on_stream(f"{path}.ff1"),
            Part(f"{path}.norm_attention", "out"),
            *self.attention.on_stream(f"{path}.attention"),
            *self.conv.on_stream(f"{path}.conv"),
            *self.ff2.on_stream(f"{path}.ff2"),
            Part(f"{path}.norm", "out"),
        )


class Conformer(nn.Module):
    """Conformer encoder; subsamples by 4.

    Taps: ``front`` (the front end's output), ``encoder.0`` ... ``encoder.<num_layers - 1>``, and of each
    layer's attention ``encoder.0.q``, ``.k``, ``.v``, queries and keys with their positions.
    Under bf16 autocast on a CPU, the residual stream is bf16 as well (the norms end each layer, so
    it does not grow); ``benchmarks/train_speed.py --check-loss`` compares what that trains to.

    Args:
        config: its options.
        input_dim: feature bins.
    """

    Config: ClassVar[type[Options]] = ConformerOptions
    tiny_options: ClassVar[dict[str, int | None]] = {
        "num_layers": 1,
        "dim": 16,
        "num_heads": 2,
        "ff_dim": None,
    }
    contract_options: ClassVar[dict[str, int]] = {
        "num_layers": 2,
        "dim": 16,
        "num_heads": 2,
        "front_channels": 4,
    }
    subsampling = 4
    layer_list: ClassVar[str] = "layers"
    free_options: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init__(self, config: ConformerOptions, input_dim: int) -> None:
        super().__init__()
        self.output_dim = config.dim
        self.front = ConvFront(input_dim, config.dim, config.front_channels, config.dropout)
        self.positions = RotaryPositions(config.dim, config.num_heads)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, ceil(T/4), D) and its lengths; padding is arbitrary."""
        x, lens_B = self.front(features_BTF, lens_B)
        mask_BT, positions = frame_mask(lens_B, x.shape[1]), self.positions(x)
        for layer in self.layers:
            x = layer(x, mask_BT, positions)
        return x, lens_B

    def taps(self) -> dict[str, Tap]:
        """Declared intermediate tensors."""
        found = {"front": Tap(self.front.dropout, self.output_dim)}
        for i, layer in enumerate(self.layers):
            attention: Any = layer.attention
            found |= {f"encoder.{i}": Tap(layer, self.output_dim), **attention.taps(f"encoder.{i}")}
        return found

    def unit_groups(self) -> list[UnitGroup]:
        """What may be cut out of it."""
        found = [self.front.unit_group("front")]
        stream = [Part("front.proj", "out")]
        for i, layer in enumerate(self.layers):
            found += layer.unit_groups(f"layers.{i}")  # type: ignore[operator]
            stream += layer.on_stream(f"layers.{i}")  # type: ignore[operator]
        return [*found, UnitGroup("stream", "width", self.output_dim, tuple(stream), output=(1,))]

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""
        return ConvFront.output_len(num_frames)


@hookimpl
def register_architectures(register: Callable[[str, type], None]) -> None:
    """Offer ``conformer``."""
    register("conformer", Conformer)
