"""Prune the weights of least magnitude, at once or step by step during training.

The share of zeros rises along the cubic of Zhu & Gupta (2017), "To prune, or not to prune":
s_t = s (1 - (1 - t / T)^3), reached after ``ramp`` of the fine-tuning. What is pruned stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, Options

MASK = "prune_mask"  # a buffer beside each weight, so that a checkpoint holds the masks, too
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


class MagnitudePrune:
    """Zeros in the weights of linear and convolution layers; biases and norms are left alone."""

    tiny_options: ClassVar[dict[str, int]] = {"epochs": 1}

    class Config(Options):
        """Options.

        Args:
            sparsity: share of zeros among the prunable weights at the end, 0 to 1.
            scope: ``global``: the smallest of all layers together; ``per_layer``: the same share in each.
            epochs: fine-tuning, over the first ``ramp`` of which weights go; 0: all at once, untrained.
            ramp: part of the fine-tuning after which the final sparsity is reached.
            every: optimiser steps from one choice of weights to the next.
            output_layer: prune the heads as well.
        """

        sparsity: float = Field(default=0.5, ge=0.0, lt=1.0)
        scope: Literal["global", "per_layer"] = "global"
        epochs: int = Field(default=5, ge=0)
        ramp: float = Field(default=0.7, gt=0.0, le=1.0)
        every: int = Field(default=10, ge=1)
        output_layer: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_epochs = config.epochs
        self._report: dict[str, float] = {}

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Add masks, all ones: pruning starts with the first step of training.

        Raises:
            KdrecipeError: there is nothing to prune.
        """
        layers = self._layers(model)
        if not layers:
            raise KdrecipeError(
                "magnitude_prune finds no weights to prune in the model",
                remedy="compress a float system, and put magnitude_prune before int8_dynamic",
            )
        for layer in layers:
            layer.register_buffer(MASK, torch.ones_like(_weight(layer), dtype=torch.bool))
        return model

    @torch.no_grad()
    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Choose again which weights to remove if it is time, and zero all that are removed."""
        layers = self._layers(model)
        ramp_steps = max(1, round(self.config.ramp * num_steps))
        if step % self.config.every == 0 or step in (ramp_steps, num_steps):
            self._choose(layers, self.sparsity_at(min(1.0, step / ramp_steps)))
        for layer in layers:
            _weight(layer).mul_(_mask(layer))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """Prune to the final sparsity and take the masks away.

        The weights may be an average over steps, the earlier ones of them less sparse: the
        last mask holds, and if it should fall short, magnitude decides once more.
        """
        layers = self._layers(model)
        for layer in layers:
            _weight(layer).mul_(_mask(layer))
        self._choose(layers, self.config.sparsity)
        for layer in layers:
            _weight(layer).mul_(_mask(layer))
            delattr(layer, MASK)
        zeros = sum(int((_weight(layer) == 0).sum()) for layer in layers)
        prunable = sum(_weight(layer).numel() for layer in layers)
        params = sum(p.numel() for p in model.parameters())
        self._report = {"sparsity": zeros / prunable, "nonzero_share": (params - zeros) / params}
        return model

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Nothing: zeros are weights like any other."""
        return model

    def report(self) -> dict[str, float]:
        """``sparsity`` of the prunable weights, ``nonzero_share`` of all parameters."""
        return self._report

    def sparsity_at(self, progress: float) -> float:
        """Share of zeros at ``progress`` (0 to 1) through the ramp."""
        return self.config.sparsity * (1.0 - (1.0 - progress) ** 3)

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        return [
            module
            for name, module in model.named_modules()
            if isinstance(module, PRUNABLE)
            and (self.config.output_layer or not name.removeprefix("module.").startswith("heads."))
        ]

    def _choose(self, layers: list[nn.Module], sparsity: float) -> None:
        """Set the masks; weights pruned before are zero, hence the smallest, hence pruned again."""
        magnitudes = [_weight(layer).abs().flatten() for layer in layers]
        if self.config.scope == "global":
            keep = torch.split(_largest(torch.cat(magnitudes), sparsity), [m.numel() for m in magnitudes])
        else:
            keep = tuple(_largest(m, sparsity) for m in magnitudes)
        for layer, kept in zip(layers, keep, strict=True):
            _mask(layer).copy_(kept.view_as(_weight(layer)))


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")


def _mask(layer: nn.Module) -> Tensor:
    return layer.get_buffer(MASK)


def _largest(magnitudes_N: Tensor, sparsity: float) -> Tensor:
    """True where a magnitude is not among the smallest ``sparsity`` of all; exact with ties, too."""
    keep_N = torch.ones_like(magnitudes_N, dtype=torch.bool)
    order_N = magnitudes_N.argsort(stable=True)
    keep_N[order_N[: round(sparsity * len(magnitudes_N))]] = False
    return keep_N


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("magnitude_prune", MagnitudePrune)
