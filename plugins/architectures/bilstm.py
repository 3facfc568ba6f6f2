"""Bidirectional LSTM encoder (Graves, Mohamed and Hinton 2013, arXiv 1303.5778)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import Options, Part, UnitGroup
from kdrecipe.layers import Dropout

from .layers import ConvFront


class BiLstmOptions(Options):
    """Options of ``name: bilstm``.

    Args:
        num_layers: layers of two LSTMs each.
        dim: width D, half of it for each direction.
        dropout: share dropped after the front end and between layers.
        front_channels: channels of the front end's convolutions.
    """

    num_layers: int = Field(default=4, ge=1)
    dim: int = Field(default=320, ge=2, multiple_of=2)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)
    front_channels: int = Field(default=32, ge=1)


class BiLstmLayer(nn.Module):
    """One LSTM from the first frame on and one from the last valid frame back, side by side; then a norm.

    The second one hears each utterance turned round within its length. So neither meets padding before
    it has heard everything, and the graph that is exported has two plain LSTMs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.forward_lstm = nn.LSTM(dim, dim // 2, batch_first=True)
        self.backward_lstm = nn.LSTM(dim, dim // 2, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BTD: Tensor, turned_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D); ``turned_BT`` has the frame that takes each frame's place."""
        ahead, _ = self.forward_lstm(x_BTD)
        back, _ = self.backward_lstm(_take(x_BTD, turned_BT))
        y_BTD: Tensor = self.norm(torch.cat([ahead, _take(back, turned_BT)], dim=2))
        return y_BTD


def _take(x_BTD: Tensor, frames_BT: Tensor) -> Tensor:
    return x_BTD.gather(1, frames_BT.unsqueeze(2).expand(-1, -1, x_BTD.shape[2]))


class BiLstm(nn.Module):
    """Bidirectional LSTM encoder; subsamples by 4.

    Taps: ``front`` (the front end's output) and ``encoder.0`` ... ``encoder.<num_layers - 1>``.

    Args:
        config: its options.
        input_dim: feature bins.
    """

    Config: ClassVar[type[Options]] = BiLstmOptions
    tiny_options: ClassVar[dict[str, int | None]] = {"num_layers": 1, "dim": 16}
    contract_options: ClassVar[dict[str, int]] = {"num_layers": 2, "dim": 16, "front_channels": 4}
    subsampling = 4
    layer_list: ClassVar[str] = "layers"
    free_options: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init__(self, config: BiLstmOptions, input_dim: int) -> None:
        super().__init__()
        self.output_dim = config.dim
        self.front = ConvFront(input_dim, config.dim, config.front_channels, config.dropout)
        self.layers = nn.ModuleList(BiLstmLayer(config.dim) for _ in range(config.num_layers))
        self.dropout = Dropout(config.dropout)

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, ceil(T/4), D) and its lengths; padding is arbitrary."""
        x, lens_B = self.front(features_BTF, lens_B)
        frames_T = torch.arange(x.shape[1], device=x.device)
        turned_BT = lens_B.unsqueeze(1) - 1 - frames_T
        turned_BT = torch.where(turned_BT >= 0, turned_BT, frames_T)  # padding stays where it is
        for number, layer in enumerate(self.layers):
            x = layer(self.dropout(x) if number else x, turned_BT)
        return x, lens_B

    def taps(self) -> dict[str, tuple[nn.Module, int]]:
        """Declared intermediate tensors: name -> (module whose output it is, D)."""
        layers: Any = self.layers
        dims = {f"encoder.{i}": (layer, layer.norm.normalized_shape[0]) for i, layer in enumerate(layers)}
        return {"front": (self.front.dropout, self.front.proj.out_features), **dims}

    def unit_groups(self) -> list[UnitGroup]:
        """What may be cut out of it: units of both LSTMs of a layer together."""
        layers: Any = self.layers

        def lstms(i: int, side: Literal["in", "out"], blocks: tuple[int, ...] = (1,)) -> list[Part]:
            ways = ("forward_lstm", "backward_lstm") if i < len(layers) else ()
            return [Part(f"layers.{i}.{way}", side, blocks) for way in ways]

        proj = Part("front.proj", "out")
        width = UnitGroup("stream", "width", self.front.proj.out_features, (proj, *lstms(0, "in")))
        found = [self.front.unit_group("front"), width]
        for i, layer in enumerate(layers):
            parts = (*lstms(i, "out"), Part(f"layers.{i}.norm", "out", (1, 1)), *lstms(i + 1, "in", (1, 1)))
            output = (1, 1) if i + 1 == len(layers) else None
            found.append(UnitGroup(f"layers.{i}", "units", layer.forward_lstm.hidden_size, parts, output))
        return found

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""
        return ConvFront.output_len(num_frames)


@hookimpl
def register_architectures(register: Callable[[str, type], None]) -> None:
    """Offer ``bilstm``."""
    register("bilstm", BiLstm)
