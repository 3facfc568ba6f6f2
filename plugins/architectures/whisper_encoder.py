"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356) at true lengths, on Lhotse's features.

B utterances, T frames, F feature bins, M Whisper's mel bins, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import Options, Part, Tap, UnitGroup
from kdrecipe.layers import Dropout, FeedForward, attend, attention_bias

from .whisper_features import RANGE, log_mel

FIT_ROUNDS = 6
"""After which the fit of the input changes by less than a thousandth."""
SILENT = -100.0
"""Below every log-mel value that there is."""
SPREAD = 0.4
"""About the deviation of Whisper's log-mel values."""


class WhisperEncoderOptions(Options):
    """Options of ``name: whisper_encoder``.

    Args:
        num_layers: Transformer blocks.
        dim: width D; a multiple of ``num_heads``, and even.
        num_heads: attention heads.
        ff_dim: width within the feed-forward modules; by default 4 * ``dim``.
        num_mels: Whisper's mel bins, to which the features are mapped.
        pooling: 2: the mean over each pair of frames, 25 per second; 1: Whisper's own 50 per second.
        silence_s: seconds of silence that follow each utterance within the encoder; its frames are not given.
        dropout: share dropped after the positions and in every module.
    """

    num_layers: int = Field(default=4, ge=1)
    dim: int = Field(default=384, ge=4, multiple_of=2)
    num_heads: int = Field(default=6, ge=1)
    ff_dim: int | None = Field(default=None, ge=1)
    num_mels: int = Field(default=80, ge=8, le=256)
    pooling: Literal[1, 2] = 2
    silence_s: float = Field(default=1.0, ge=0.0, le=30.0)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)

    @model_validator(mode="after")
    def _shapes_fit(self) -> WhisperEncoderOptions:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        return self


class WhisperLayer(nn.Module):
    """Attention, then feed-forward, each with its norm before it and a residual around it.

    Whisper's keys have no bias. Here they have one, which is 0 there and changes nothing: it adds the same to
    all scores of a query.
    """

    def __init__(self, config: WhisperEncoderOptions) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.norm_attention = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.ff = FeedForward(config.dim, config.ff_dim or 4 * config.dim, config.dropout, nn.GELU())
        self.dropout = Dropout(config.dropout)
        self.given = nn.ModuleDict({name: nn.Identity() for name in ("out", "q", "k", "v")})  # see taps()

    def forward(self, x_BTD: Tensor, mask_BT: Tensor, num_frames: int) -> Tensor:
        """(B, T, D) to (B, T, D), of which the first ``num_frames`` are not silence."""
        qkv = self.qkv(self.norm_attention(x_BTD)).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        for name, heads in (("q", q), ("k", k), ("v", v)):
            self.given[name](heads[:, :, :num_frames])
        y = attend(q, k, v, attention_bias(mask_BT, v.dtype)[:, None, None, :])
        x = x_BTD + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y_BTD: Tensor = x + self.dropout(self.ff(x))
        self.given["out"](y_BTD[:, :num_frames])
        return y_BTD

    def taps(self, name: str) -> dict[str, Tap]:
        """What comes before the silence, by the name of the layer."""
        dims = {"out": self.out.out_features}
        return {
            name if x == "out" else f"{name}.{x}": Tap(
                module, dims.get(x, self.out.in_features), subsampling=2
            )
            for x, module in self.given.items()
        }

    def unit_groups(self, path: str) -> list[UnitGroup]:
        """What may be cut out of it; it stands at ``path``."""
        dim = self.head_dim
        parts = (Part(f"{path}.qkv", "out", (dim, dim, dim)), Part(f"{path}.out", "in", (dim,)))
        heads = UnitGroup(path, "heads", self.out.in_features // dim, parts)
        return [heads, self.ff.unit_group(f"{path}.ff")]


class WhisperEncoder(nn.Module):
    """Whisper's encoder; subsamples by 4, or by 2 without pooling.

    Whisper hears 30 s whatever an utterance's length. This encoder hears the utterance, of any length
    (positions are sines, which have no end), and a little silence, without which Whisper's decoder does not
    find the end. A linear map (:meth:`fit_input`) makes Whisper's log-mel values of two frames of the
    recipe's features, the one before and the one at hand: Whisper's are centred between them. As Whisper
    does, values are then raised to 80 dB below the utterance's largest.

    Taps: ``encoder.0`` ... ``encoder.<num_layers - 1>``, before the final norm and the pooling, and of each
    layer's attention ``encoder.0.q``, ``.k``, ``.v``; a frame per 0.02 s as Whisper's own.

    Args:
        config: its options.
        input_dim: feature bins.
    """

    Config: ClassVar[type[Options]] = WhisperEncoderOptions
    tiny_options: ClassVar[dict[str, int | None]] = {
        "num_layers": 1,
        "dim": 16,
        "num_heads": 2,
        "ff_dim": None,
    }
    contract_options: ClassVar[dict[str, int]] = {"num_layers": 2, "dim": 16, "num_heads": 2}
    layer_list: ClassVar[str] = "layers"
    free_options: ClassVar[tuple[str, ...]] = ("dropout", "pooling", "silence_s")

    def __init__(self, config: WhisperEncoderOptions, input_dim: int) -> None:
        super().__init__()
        dim = config.dim
        self.output_dim = dim
        self.pooling = config.pooling
        self.subsampling = 2 * config.pooling
        self.num_mels = config.num_mels
        self.num_silent = round(config.silence_s * 100)
        self.input_map = nn.Linear(2 * input_dim, config.num_mels)
        with torch.no_grad():
            both = torch.eye(config.num_mels, input_dim) * (SPREAD / 2)
            self.input_map.weight.copy_(torch.cat([both, both], dim=1))
            self.input_map.bias.zero_()
        self.conv1 = nn.Conv1d(config.num_mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) normalised features to (B, T', D) and its lengths; padding is arbitrary."""
        x = self._convolved(self._log_mel(features_BTF, lens_B), lens_B + self.num_silent)
        x = self.dropout(x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype))
        mask_BT = frame_mask(_halved(lens_B + self.num_silent), x.shape[1])
        num_frames, lens_B = (features_BTF.shape[1] + 1) // 2, _halved(lens_B)
        for layer in self.layers:
            x = layer(x, mask_BT, num_frames)
        x = self.norm(x[:, :num_frames])
        if self.pooling == 1:
            return x, lens_B
        mask_BT = frame_mask(lens_B, num_frames)
        # one frame more, so that an odd last one has a partner; padding counts as nothing
        x = F.pad(x * mask_BT[:, :, None], (0, 0, 0, 1))
        count = F.pad(mask_BT.to(x.dtype), (0, 1))[:, :, None]
        x, count = (F.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2) for y in (x, count))
        return x / count.clamp(min=0.5), _halved(lens_B)

    def _log_mel(self, features_BTF: Tensor, lens_B: Tensor) -> Tensor:
        """(B, M, T + silence) as Whisper hears it, 0 where there is nothing."""
        y = F.pad(self.input_map(_with_previous(features_BTF)), (0, 0, 0, self.num_silent))
        spoken, heard = (
            frame_mask(lens, y.shape[1])[:, :, None] for lens in (lens_B, lens_B + self.num_silent)
        )
        y = y.masked_fill(~spoken, SILENT)
        lowest_B11 = y.amax((1, 2), keepdim=True) - RANGE
        return torch.maximum(y, lowest_B11).masked_fill(~heard, 0.0).transpose(1, 2)

    def _convolved(self, x_BMT: Tensor, lens_B: Tensor) -> Tensor:
        """(B, T / 2, D)."""
        mask_BT = frame_mask(lens_B, x_BMT.shape[2])
        x = F.gelu(self.conv1(x_BMT)).masked_fill(~mask_BT[:, None], 0.0)
        return F.gelu(self.conv2(x)).transpose(1, 2)

    @torch.no_grad()
    def fit_input(self, utterances: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Fit the input's map to Whisper's own log-mel values, by least squares.

        What Whisper raises to its lowest value is as good as it comes anywhere below: such values are
        fitted where the map itself puts them too high, in a few rounds.

        Args:
            utterances: normalised features (T, F) and audio (S,) at 16 kHz of each; a few minutes suffice.

        Returns:
            The error's root mean square, as a share of the deviation of Whisper's values.
        """
        inputs, wanted = [], []
        for features_TF, samples_S in utterances:
            wanted.append(log_mel(samples_S, self.num_mels)[: len(features_TF)])
            inputs.append(_with_previous(features_TF[None])[0][: len(wanted[-1])])
        ones = [F.pad(x.double(), (0, 1), value=1.0) for x in inputs]
        lowest = [y.max() - RANGE + 1e-5 for y in wanted]
        products_II = torch.stack([x.t() @ x for x in ones]).sum(0)
        products_II += 1e-6 * products_II.trace() * torch.eye(len(products_II))
        found = [y.double() for y in wanted]
        for _ in range(FIT_ROUNDS):
            targets = [
                torch.where((y <= low) & (f < y), f, y.double())
                for y, low, f in zip(wanted, lowest, found, strict=True)
            ]
            sums_IM = torch.stack([x.t() @ y for x, y in zip(ones, targets, strict=True)]).sum(0)
            map_IM = torch.linalg.solve(products_II, sums_IM)
            found = [x @ map_IM for x in ones]
        self.input_map.weight.copy_(map_IM[:-1].t())
        self.input_map.bias.copy_(map_IM[-1])
        found_TM = [self._log_mel(x[None], torch.tensor([len(x)]))[0].t() for x, _ in utterances]
        wanted_TM = torch.cat(wanted)
        error = torch.cat([f[: len(y)] for f, y in zip(found_TM, wanted, strict=True)]) - wanted_TM
        return float(error.square().mean().sqrt() / wanted_TM.std(0).square().mean().sqrt())

    def taps(self) -> dict[str, Tap]:
        """Declared intermediate tensors."""
        found: dict[str, Tap] = {}
        for i, layer in enumerate(self.layers):
            found |= layer.taps(f"encoder.{i}")  # type: ignore[operator]
        return found

    def unit_groups(self) -> list[UnitGroup]:
        """Heads and units; its width is that of its positions."""
        return [g for i, layer in enumerate(self.layers) for g in layer.unit_groups(f"layers.{i}")]  # type: ignore[operator]

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""
        return (num_frames + self.subsampling - 1) // self.subsampling


def _halved(lens_B: Tensor) -> Tensor:
    return torch.div(lens_B + 1, 2, rounding_mode="floor")


def _with_previous(x_BTF: Tensor) -> Tensor:
    """(B, T, 2 F): each frame after the one before it, the first after itself."""
    return torch.cat([torch.cat([x_BTF[:, :1], x_BTF[:, :-1]], dim=1), x_BTF], dim=2)


def sinusoids(num_frames: int, dim: int, device: torch.device) -> Tensor:
    """(T, D) Whisper's positions: sines, then cosines, of D / 2 frequencies from 1 down to 1e-4."""
    rates = torch.exp(torch.arange(dim // 2, device=device) * (-math.log(10000.0) / (dim // 2 - 1)))
    angles = torch.arange(num_frames, device=device)[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@hookimpl
def register_architectures(register: Callable[[str, type], None]) -> None:
    """Offer ``whisper_encoder``."""
    register("whisper_encoder", WhisperEncoder)
