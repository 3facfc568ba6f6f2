"""Transformer encoder with norms before the modules and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Options, Part, Tap, UnitGroup
from kdrecipe.layers import Dropout, FeedForward

from .layers import ConvFront, RotaryPositions, SelfAttention


class TransformerOptions(Options):
    """Options of ``name: transformer``.

    Args:
        num_layers: Transformer blocks.
        dim: width D; a multiple of ``2 * num_heads``.
        num_heads: attention heads.
        ff_dim: width within the feed-forward modules; by default 4 * ``dim``.
        dropout: share dropped after the front end and in every module.
        front_channels: channels of the front end's convolutions.
    """

    num_layers: int = Field(default=12, ge=1)
    dim: int = Field(default=256, ge=2)
    num_heads: int = Field(default=4, ge=1)
    ff_dim: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)
    front_channels: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _shapes_fit(self) -> TransformerOptions:
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 2 * num_heads = {2 * self.num_heads}")
        return self


class TransformerLayer(nn.Module):
    """Attention, then feed-forward, each with its norm before it and a residual around it."""

    def __init__(self, config: TransformerOptions) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.ff = FeedForward(config.dim, config.ff_dim or 4 * config.dim, config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x_BTD + self.dropout(self.attention(self.norm_attention(x_BTD), mask_BT, positions))
        y_BTD: Tensor = x + self.dropout(self.ff(x))
        return y_BTD

    def unit_groups(self, path: str) -> list[UnitGroup]:
        """What may be cut out of it; it stands at ``path``."""
        return [self.attention.unit_group(f"{path}.attention"), self.ff.unit_group(f"{path}.ff")]

    def on_stream(self, path: str) -> tuple[Part, ...]:
        """Where it reads and writes the stream."""
        attention = self.attention.on_stream(f"{path}.attention")
        return Part(f"{path}.norm_attention", "out"), *attention, *self.ff.on_stream(f"{path}.ff")


class Transformer(nn.Module):
    """Transformer encoder; subsamples by 4.

    Taps: ``front`` (the front end's output), ``encoder.0`` ... ``encoder.<num_layers - 1>``, before the
    final norm, and of each layer's attention ``encoder.0.q``, ``.k``, ``.v``, queries and keys with their
    positions.

    Args:
        config: its options.
        input_dim: feature bins.
    """

    Config: ClassVar[type[Options]] = TransformerOptions
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

    def __init__(self, config: TransformerOptions, input_dim: int) -> None:
        super().__init__()
        self.output_dim = config.dim
        self.front = ConvFront(input_dim, config.dim, config.front_channels, config.dropout)
        self.positions = RotaryPositions(config.dim, config.num_heads)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, ceil(T/4), D) and its lengths; padding is arbitrary."""
        x, lens_B = self.front(features_BTF, lens_B)
        mask_BT, positions = frame_mask(lens_B, x.shape[1]), self.positions(x)
        for layer in self.layers:
            x = layer(x, mask_BT, positions)
        return self.norm(x), lens_B

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
        stream = [Part("front.proj", "out"), Part("norm", "out")]
        for i, layer in enumerate(self.layers):
            found += layer.unit_groups(f"layers.{i}")  # type: ignore[operator]
            stream += layer.on_stream(f"layers.{i}")  # type: ignore[operator]
        return [*found, UnitGroup("stream", "width", self.output_dim, tuple(stream), output=(1,))]

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""
        return ConvFront.output_len(num_frames)


@hookimpl
def register_architectures(register: Callable[[str, type], None]) -> None:
    """Offer ``transformer``."""
    register("transformer", Transformer)
