"""What linear layers are given, looked at on a few utterances. N rows, I inputs."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Batch, CompressContext

ROWS_PER_UTTERANCE = 8
MAX_ROWS = 512
CLIPS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]


@dataclass
class Inputs:
    """What a layer was given.

    Args:
        largest_I: largest magnitude of each input.
        rows_NI: some of the rows.
    """

    largest_I: Tensor
    rows_NI: Tensor

    def add(self, rows_NI: Tensor) -> None:
        """Look at the rows of one utterance."""
        self.largest_I = torch.maximum(self.largest_I, rows_NI.abs().amax(0))
        if len(self.rows_NI) < MAX_ROWS:
            kept_NI = rows_NI[:: max(1, len(rows_NI) // ROWS_PER_UTTERANCE)]
            self.rows_NI = torch.cat([self.rows_NI, kept_NI])


@torch.no_grad()
def observe(
    model: nn.Module, names: Collection[str], context: CompressContext, compressor: str
) -> dict[str, Inputs]:
    """Inputs by name of the layer; layers that never ran are missing.

    Utterances run one by one, so that padding is never looked at, and with their texts, for heads that
    hear them.

    Raises:
        KdrecipeError: there is no utterance.
    """
    found: dict[str, Inputs] = {}

    def look(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        rows_NI = given[0].detach().float().flatten(0, -2)
        if name not in found:
            found[name] = Inputs(rows_NI.new_zeros(rows_NI.shape[1]), rows_NI[:0])
        found[name].add(rows_NI)

    was_training = model.training
    model.eval()
    number = 0
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(partial(look, name))
            stack.callback(handle.remove)
        for batch in context.calibration():
            for row in range(len(batch)):
                alone = _alone(batch, row)
                model(alone.features_BTF, alone.lens_B, batch=alone)
                number += 1
    model.train(was_training)
    if not number:
        raise KdrecipeError(
            f"{compressor} has no utterance to calibrate on",
            remedy="give the corpus a split dev (or train) with utterances: activations are seen there",
        )
    return found


def _alone(batch: Batch, row: int) -> Batch:
    """One utterance of a batch, without padding."""
    alone = batch.select(torch.arange(len(batch)) == row)
    num_frames, num_tokens = int(alone.lens_B[0]), int(alone.token_lens_B[0])
    return replace(
        alone, features_BTF=alone.features_BTF[:, :num_frames], tokens_BU=alone.tokens_BU[:, :num_tokens]
    )


def smoothing(inputs: Inputs, weight_OI: Tensor, strength: float) -> Tensor:
    """(I,) what inputs are divided by, and weights multiplied by, so that both have similar ranges.

    ``max|x_i| ** strength / max|w_i| ** (1 - strength)``: "SmoothQuant" (Xiao 2023, arXiv 2211.10438).
    """
    largest_I = inputs.largest_I.clamp_min(1e-5)
    weight_I = weight_OI.detach().float().abs().amax(0).clamp_min(1e-5)
    smooth_I = largest_I**strength / weight_I ** (1 - strength)
    return (smooth_I / smooth_I.log().mean().exp()).clamp(1e-3, 1e3)


def affine_range(rows_NI: Tensor, *, clip: bool) -> tuple[Tensor, Tensor]:
    """Scale () and zero point () uint8 for 8 bits, 0 included.

    Args:
        rows_NI: values.
        clip: choose each end for the least squared error; otherwise nothing that was seen is cut off.
    """
    low, high = float(rows_NI.min().clamp(max=0.0)), float(rows_NI.max().clamp(min=0.0))
    if clip:  # one end after the other: outliers are mostly on one side
        high = min((share * high for share in CLIPS), key=lambda end: _error(rows_NI, low, end))
        low = min((share * low for share in CLIPS), key=lambda end: _error(rows_NI, end, high))
    return _grid(low, high)


def _grid(low: float, high: float) -> tuple[Tensor, Tensor]:
    scale = torch.tensor(max((high - low) / 255, 1e-12))
    return scale, (-low / scale).round().clamp(0, 255).to(torch.uint8)


def _error(rows_NI: Tensor, low: float, high: float) -> float:
    scale, zero = _grid(low, high)
    rounded_NI = ((rows_NI / scale).round() + zero.float()).clamp(0, 255) - zero.float()
    return float((rounded_NI * scale - rows_NI).square().mean())
