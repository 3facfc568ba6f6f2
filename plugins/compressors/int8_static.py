"""8-bit linear layers whose activations have one scale each, found by calibration: plain QDQ in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import Problem
from kdrecipe.interfaces import CompressContext

from .calibration import Inputs, affine_range, observe, smoothing
from .integer_layers import StaticInt8Linear
from .quantising import LayerOptions, Quantiser, last_step


class Int8Static(Quantiser):
    """Linear layers compute in integers by calibrated scales; other weights are stored in 8 bits.

    A layer that calibration does not reach has scales per frame, as of ``int8_dynamic``.
    """

    class Config(LayerOptions):
        """Options; the others are those of :class:`LayerOptions`.

        Args:
            smooth: strength of SmoothQuant's scaling, 0 to 1: how much of the inputs' outlier channels goes
                over into the weights before both are rounded; 0: nothing.
            clip: cut off what is rare, where that rounds the rest better; false: the full range.
        """

        smooth: float = Field(default=0.5, ge=0.0, le=1.0)
        clip: bool = True

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__("int8_static", config, "int8_static")

    @torch.no_grad()
    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Calibrate, then quantise in place; reports also ``not_calibrated``, layers that were not reached.

        Raises:
            KdrecipeError: there is no utterance, or no linear layer (left) to quantise.
        """
        self._layers.choose(model)
        kinds = self._layers.kinds
        static = [name for name, kind in kinds.items() if kind == "int8_static"]
        seen = observe(model, static, context, "int8_static")
        kinds.update({name: "int8" for name in static if name not in seen})

        def make(name: str, linear: nn.Linear, kind: str) -> nn.Module:
            if kind != "int8_static":
                return self._layers.rounded(linear, kind)
            return calibrated(linear, seen[name], smooth=self.config.smooth, clip=self.config.clip)

        self._layers.replace(model, make)
        unreached = sum(name not in seen for name in static)
        self._report = {**self._layers.report(model), "not_calibrated": float(unreached)}
        return model


def calibrated(linear: nn.Linear, inputs: Inputs, *, smooth: float, clip: bool) -> StaticInt8Linear:
    """The 8-bit layer of a linear one that was given ``inputs``."""
    scaled = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    smooth_I = torch.ones_like(inputs.largest_I)
    if smooth:
        smooth_I = smoothing(inputs, linear.weight, smooth)
    scaled.weight.data = linear.weight.detach().float() * smooth_I
    if linear.bias is not None:
        scaled.bias.data = linear.bias.detach().float().clone()
    new = StaticInt8Linear.from_linear(scaled).to(linear.weight.device)
    new.smooth_I = smooth_I
    new.input_scale, new.input_zero = affine_range(inputs.rows_NI / smooth_I, clip=clip)
    return new.train(linear.training)


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("int8_static", Int8Static)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """It has to be the last step."""
    return last_step(recipe, "int8_static")
