"""QuartzNet (Kriman et al. 2019, arXiv 1910.10261): convolutions over time, separable from channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Options, Part, UnitGroup
from kdrecipe.layers import Dropout

from .layers import ConvFront, along_time, depthwise_conv


class CnnOptions(Options):
    """Options of ``name: cnn``.

    Args:
        num_layers: blocks with a residual around them.
        dim: width D.
        repeats: separable convolutions per block.
        kernel_size: of the depthwise convolutions, odd, in frames of 0.04 s.
        dropout: share dropped after the front end and after every convolution.
        front_channels: channels of the front end's convolutions.
    """

    num_layers: int = Field(default=5, ge=1)
    dim: int = Field(default=256, ge=1)
    repeats: int = Field(default=3, ge=1)
    kernel_size: int = Field(default=17, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)
    front_channels: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _shapes_fit(self) -> CnnOptions:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} is even; it must be odd")
        return self


class SeparableConv(nn.Module):
    """Depthwise over time, pointwise over channels, LayerNorm in place of BatchNorm."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = depthwise_conv(dim, kernel_size)
        self.pointwise = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        y_BTD: Tensor = self.norm(self.pointwise(along_time(self.depthwise, x_BTD, mask_BT)))
        return y_BTD

    @staticmethod
    def reading(path: str) -> tuple[Part, ...]:
        """Where it reads its input."""
        return Part(f"{path}.depthwise", "out"), Part(f"{path}.pointwise", "in")


class CnnBlock(nn.Module):
    """Separable convolutions, ReLU and dropout after each; the residual joins before the last ReLU."""

    def __init__(self, config: CnnOptions) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            SeparableConv(config.dim, config.kernel_size) for _ in range(config.repeats)
        )
        self.residual = nn.Sequential(nn.Linear(config.dim, config.dim), nn.LayerNorm(config.dim))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x_BTD
        for conv in self.convs[:-1]:
            x = self.dropout(F.relu(conv(x, mask_BT)))
        x = self.convs[-1](x, mask_BT) + self.residual(x_BTD)
        y_BTD: Tensor = self.dropout(F.relu(x))
        return y_BTD

    def unit_groups(self, path: str) -> list[UnitGroup]:
        """Channels between its convolutions; it stands at ``path``."""
        convs: Any = self.convs
        return [
            UnitGroup(
                f"{path}.convs.{j}",
                "channels",
                conv.pointwise.out_features,
                (
                    Part(f"{path}.convs.{j}.pointwise", "out"),
                    Part(f"{path}.convs.{j}.norm", "out"),
                    *SeparableConv.reading(f"{path}.convs.{j + 1}"),
                ),
            )
            for j, conv in enumerate(convs[:-1])
        ]

    def reading(self, path: str) -> tuple[Part, ...]:
        """Where it reads its input."""
        return *SeparableConv.reading(f"{path}.convs.0"), Part(f"{path}.residual.0", "in")

    def writing(self, path: str) -> tuple[Part, ...]:
        """Where it writes its output."""
        last = f"{path}.convs.{len(self.convs) - 1}"
        layers = (f"{last}.pointwise", f"{last}.norm", f"{path}.residual.0", f"{path}.residual.1")
        return tuple(Part(layer, "out") for layer in layers)


class Cnn(nn.Module):
    """Encoder of separable convolutions; subsamples by 4.

    Each frame sees ``num_layers * repeats * (kernel_size - 1) / 2`` frames on either side. QuartzNet's
    kernels grow from block to block; here all blocks are alike, so that layers can be chosen of them.

    Taps: ``front`` (the front end's output) and ``encoder.0`` ... ``encoder.<num_layers - 1>``.

    Args:
        config: its options.
        input_dim: feature bins.
    """

    Config: ClassVar[type[Options]] = CnnOptions
    tiny_options: ClassVar[dict[str, int | None]] = {"num_layers": 1, "dim": 16, "repeats": 1}
    contract_options: ClassVar[dict[str, int]] = {
        "num_layers": 2,
        "dim": 16,
        "repeats": 2,
        "kernel_size": 5,
        "front_channels": 4,
    }
    subsampling = 4
    layer_list: ClassVar[str] = "layers"
    free_options: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init__(self, config: CnnOptions, input_dim: int) -> None:
        super().__init__()
        self.output_dim = config.dim
        self.front = ConvFront(input_dim, config.dim, config.front_channels, config.dropout)
        self.layers = nn.ModuleList(CnnBlock(config) for _ in range(config.num_layers))

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, ceil(T/4), D) and its lengths; padding is arbitrary."""
        x, lens_B = self.front(features_BTF, lens_B)
        mask_BT = frame_mask(lens_B, x.shape[1])
        for layer in self.layers:
            x = layer(x, mask_BT)
        return x, lens_B

    def taps(self) -> dict[str, tuple[nn.Module, int]]:
        """Declared intermediate tensors: name -> (module whose output it is, D)."""
        layers: Any = self.layers
        dims = {f"encoder.{i}": (layer, layer.residual[0].out_features) for i, layer in enumerate(layers)}
        return {"front": (self.front.dropout, self.front.proj.out_features), **dims}

    def unit_groups(self) -> list[UnitGroup]:
        """What may be cut out of it: no width is tied to another, since the residual has a map of its own."""
        layers: Any = self.layers
        reading = [block.reading(f"layers.{i}") for i, block in enumerate(layers)]
        proj, dim = Part("front.proj", "out"), self.front.proj.out_features
        found = [self.front.unit_group("front"), UnitGroup("stream", "width", dim, (proj, *reading[0]))]
        for i, block in enumerate(layers):
            found += block.unit_groups(f"layers.{i}")
            is_last, dim = i + 1 == len(layers), block.residual[0].out_features
            parts = (*block.writing(f"layers.{i}"), *(() if is_last else reading[i + 1]))
            found.append(UnitGroup(f"layers.{i}", "width", dim, parts, output=(1,) if is_last else None))
        return found

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""
        return ConvFront.output_len(num_frames)


@hookimpl
def register_architectures(register: Callable[[str, type], None]) -> None:
    """Offer ``cnn``."""
    register("cnn", Cnn)
