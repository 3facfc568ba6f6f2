"""Quantisation-aware training: linear layers train with the rounding that they will have.

Gradients pass the rounding as if it were not there (Bengio et al. 2013, arXiv 1308.3432). Losses and
teachers are the parent's own, or those that ``compress`` names: with the float parent as teacher, the student
learns to say in integers what it said in floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError, Problem
from kdrecipe.interfaces import CompressContext

from .calibration import affine_range, observe
from .integer_layers import (
    QMAX,
    Int4Linear,
    Int8Linear,
    StaticInt8Linear,
    groups_to_int4,
    rounded_frames,
    rows_to_int8,
)
from .onnx_ops import FRAME_STEP
from .quantising import LayerOptions, Quantiser, last_step, set_submodule

MASK = "zero_mask"  # a buffer of the layers that were pruned before


class FakeQuantLinear(nn.Module):
    """A linear layer that rounds weights and inputs as an integer layer does, and trains in floats.

    Args:
        linear: whose weights it takes over.
        kind: ``int8``, ``int8_static`` or ``int4``.
        group: of ``int4``.
        scale: of the inputs, of ``int8_static``.
        zero: likewise, uint8.
    """

    def __init__(
        self,
        linear: nn.Linear,
        kind: str,
        group: int = 32,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.group = kind, group
        self.weight, self.bias = linear.weight, linear.bias
        if (linear.weight == 0).any():  # pruned weights stay pruned
            self.register_buffer(MASK, linear.weight.detach() != 0)
        if scale is not None and zero is not None:
            self.register_buffer("input_scale", scale)
            self.register_buffer("input_zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        with torch.no_grad():
            weight, inputs = self._rounded_weight(), self._rounded_inputs(x.float())
        cut = x if self.kind != "int8_static" else self._cut(x)
        return F.linear(
            cut + (inputs - cut).detach(), self.weight + (weight - self.weight).detach(), self.bias
        )

    def _rounded_weight(self) -> Tensor:
        if self.kind == "int4":
            new = Int4Linear.like(self, self.group)  # type: ignore[arg-type]
            integers, scale_OG = groups_to_int4(new._grouped(self.weight.float()))
            return (integers * scale_OG[..., None]).flatten(1)[:, : self.in_features]
        integers, scale_O = rows_to_int8(self.weight, QMAX)
        return integers.float() * scale_O[:, None]

    def _rounded_inputs(self, x: Tensor) -> Tensor:
        if self.kind == "int4":
            return x
        if self.kind == "int8":
            integers, largest = rounded_frames(x)
            return integers * FRAME_STEP * largest
        scale, zero = self.get_buffer("input_scale"), self.get_buffer("input_zero").float()
        return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale

    def _cut(self, x: Tensor) -> Tensor:
        """Within the range that can be said: what is beyond has no gradient."""
        scale, zero = self.get_buffer("input_scale"), self.get_buffer("input_zero").float()
        return torch.minimum(torch.maximum(x, -zero * scale), (255 - zero) * scale)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def integer(self) -> nn.Module:
        """The integer layer that computes what this one says."""
        if self.kind == "int4":
            return Int4Linear.from_linear(self, group=self.group)  # type: ignore[arg-type]
        cls = Int8Linear if self.kind == "int8" else StaticInt8Linear
        new = cls.from_linear(self)  # type: ignore[arg-type]
        if isinstance(new, StaticInt8Linear):
            new.input_scale, new.input_zero = (
                self.get_buffer(name).clone() for name in ("input_scale", "input_zero")
            )
        return new


class Qat(Quantiser):
    """Train with rounded linear layers, then make them integers; other weights are stored in 8 bits."""

    tiny_options: ClassVar[dict[str, int]] = {"epochs": 1}

    class Config(LayerOptions):
        """Options; the others are those of :class:`LayerOptions`.

        Args:
            epochs: of training, 1 or more.
            format: what linear layers become, as the compressor of that name makes them: ``int8`` (of
                ``int8_dynamic``), ``int8_static`` or ``int4``.
        """

        epochs: int = Field(default=5, ge=1)
        format: Literal["int8", "int8_static", "int4"] = "int8"

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__("qat", config, config.format)
        self.num_epochs = config.epochs

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Put rounding layers in the place of linear ones; static scales are calibrated here and stay.

        Raises:
            KdrecipeError: no linear layer (left) to quantise, or no utterance to calibrate on.
        """
        self._layers.choose(model)
        kinds = self._layers.kinds
        static = [name for name, kind in kinds.items() if kind == "int8_static"]
        seen = observe(model, static, context, "qat") if static else {}
        kinds.update({name: "int8" for name in static if name not in seen})
        for name, kind in kinds.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                ranges = affine_range(seen[name].rows_NI, clip=True) if kind == "int8_static" else ()
                set_submodule(model, name, FakeQuantLinear(layer, kind, self.config.group, *ranges))
        return model

    @torch.no_grad()
    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """What was pruned before stays 0."""
        for module in model.modules():
            if isinstance(module, FakeQuantLinear) and hasattr(module, MASK):
                module.weight.mul_(module.get_buffer(MASK))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """Integers in the place of rounding layers.

        Raises:
            KdrecipeError: there are none: ``apply`` was not called on this model.
        """
        self.on_step(model, 0, 0)  # the weights may be an average over steps
        fakes = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
        if not fakes:
            raise KdrecipeError("qat: the model has no layers that were prepared for training")
        self._layers.replace(model, lambda name, fake, kind: fake.integer())  # type: ignore[operator]
        self._report = self._layers.report(model)
        return model


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("qat", Qat)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """It has to be the last step."""
    return last_step(recipe, "qat")
