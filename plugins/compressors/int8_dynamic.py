"""Linear layers with 8-bit integer weights; activations are quantised as they come.

Weights: one scale per output row, symmetric, -127 to 127 (so 0 stays 0, and pruned weights stay
pruned). Activations: one scale per frame, symmetric; a frame's result hence never depends on the
padding or on the other utterances of a batch. The product runs in integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError, Problem
from kdrecipe.interfaces import CompressContext, Options

QMAX = 127  # -128 is left out: symmetric, and the ONNX grid is the same
MIN_SCALE = 1e-12  # of an all-zero row


class Int8Linear(nn.Module):
    """``nn.Linear`` with int8 weights.

    State: ``weight`` (O, I) int8, ``scale_O`` float32, ``bias`` (O) or None; all plain tensors.
    """

    scale_O: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        # A parameter, not a buffer, so that the number of parameters is the parent's.
        weight_OI = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_buffer("scale_O", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Round a layer's weights to the nearest of 255 steps per output row."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None)
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(1) / QMAX).clamp_min(MIN_SCALE)
        new.weight.data = (weight_OI / scale_O[:, None]).round().clamp(-QMAX, QMAX).to(torch.int8)
        new.scale_O = scale_O
        if new.bias is not None:
            new.bias.data = linear.bias.detach().float().clone()
        return new.train(linear.training)

    def to_float(self) -> nn.Linear:
        """The layer with the same (rounded) weights in float32."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight.data = self.weight.float() * self.scale_O[:, None]
        if self.bias is not None:
            linear.bias.data = self.bias.detach().clone()
        return linear.requires_grad_(False).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the type of ``x``."""
        rows_NI = x.reshape(-1, self.in_features).float()
        scale_N1 = (rows_NI.abs().amax(1, keepdim=True) / QMAX).clamp_min(MIN_SCALE)
        quantised_NI = (rows_NI / scale_N1).round()
        if x.is_cuda:  # its int8 product needs multiples of 8; whole numbers this small are exact in fp32
            product_NO = quantised_NI @ self.weight.float().t()
        else:
            product_NO = torch._int_mm(quantised_NI.to(torch.int8), self.weight.t()).float()
        y_NO = product_NO * scale_N1 * self.scale_O
        if self.bias is not None:
            y_NO = y_NO + self.bias
        return y_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Dynamic:
    """Every ``nn.Linear`` becomes an :class:`Int8Linear`; convolutions and norms stay in float."""

    num_epochs = 0

    class Config(Options):
        """Options.

        Args:
            output_layer: quantise the heads' linear layers as well.
        """

        output_layer: bool = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self._report: dict[str, float] = {}

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Quantise in place.

        Raises:
            KdrecipeError: the model has no linear layer (left) to quantise.
        """
        names = self._linears(model)
        if not names:
            raise KdrecipeError(
                "int8_dynamic finds no linear layer in the model",
                remedy="compress a float system, and give int8_dynamic once, as the last step",
            )
        total = sum(p.numel() for p in model.parameters())
        self._replace(model, names, Int8Linear.from_linear)
        int8 = sum(p.numel() for p in model.parameters() if p.dtype == torch.int8)
        self._report = {"int8_layers": float(len(names)), "int8_share": int8 / total}
        return model

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Nothing: it needs no training."""

    def finish(self, model: nn.Module) -> nn.Module:
        return model

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Put empty int8 layers where ``apply`` puts filled ones."""
        self._replace(
            model,
            self._linears(model),
            lambda linear: Int8Linear(linear.in_features, linear.out_features, linear.bias is not None).to(
                linear.weight.device
            ),
        )
        return model

    def report(self) -> dict[str, float]:
        """``int8_layers``, and ``int8_share``: the part of all parameters that is int8 now."""
        return self._report

    def _linears(self, model: nn.Module) -> list[str]:
        # Only nn.Linear itself: a subclass is one because something reads its weights directly.
        return [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and (self.config.output_layer or not name.startswith("heads."))
        ]

    @staticmethod
    def _replace(model: nn.Module, names: list[str], change: Callable[[Any], nn.Module]) -> None:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("int8_dynamic", Int8Dynamic)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """Int8 weights can't be trained or pruned any more: it has to be the last step."""
    return [
        Problem(
            f"{step.name} comes after int8_dynamic",
            recipe.document.where(("systems", system.name, "compress", "steps", number)),
            "give int8_dynamic last",
        )
        for system in recipe.systems.values()
        for number, step in enumerate(system.steps)
        if "int8_dynamic" in [earlier.name for earlier in system.steps[:number]]
    ]
