"""Prune the weights of least magnitude, at once or step by step during training.

The share of zeros rises along the cubic of Zhu & Gupta (2017), "To prune, or not to prune":
s_t = s (1 - (1 - t / T)^3), reached after ``ramp`` of the fine-tuning. What is pruned stays so.

With a pattern N:M, at most N of M weights in a row are left (Mishra et al. 2021, arXiv 2104.08378): what the
sparse units of GPUs can use, and CPU kernels that know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, Options

MASK = "prune_mask"  # a buffer beside each weight, so that a checkpoint holds the masks, too
DEFAULT_SPARSITY = 0.5
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


class MagnitudePrune:
    """Zeros in the weights of linear and convolution layers; biases and norms are left alone."""

    tiny_options: ClassVar[dict[str, int]] = {"epochs": 1}

    class Config(Options):
        """Options.

        Args:
            sparsity: share of zeros among the prunable weights at the end, 0 to 1; by default a half.
            pattern: ``2:4``: of each four weights that a row has beside each other, two are left; in place of
                ``sparsity`` and ``scope``. What is left over at a row's end stays.
            scope: ``global``: the smallest of all layers together; ``per_layer``: the same share in each.
            epochs: fine-tuning, over the first ``ramp`` of which weights go; 0: all at once, untrained.
            ramp: part of the fine-tuning after which the final sparsity is reached.
            every: optimiser steps from one choice of weights to the next.
            output_layer: prune the heads as well.
        """

        sparsity: float | None = Field(default=None, ge=0.0, lt=1.0)
        pattern: str | None = Field(default=None, pattern=r"^[1-9][0-9]?:[1-9][0-9]?$")
        scope: Literal["global", "per_layer"] = "global"
        epochs: int = Field(default=5, ge=0)
        ramp: float = Field(default=0.7, gt=0.0, le=1.0)
        every: int = Field(default=10, ge=1)
        output_layer: bool = False

        @model_validator(mode="after")
        def _one_of_them(self) -> MagnitudePrune.Config:
            if self.pattern is not None:
                if self.sparsity is not None:
                    raise ValueError("sparsity and pattern exclude each other")
                if self.kept_of[0] >= self.kept_of[1]:
                    raise ValueError(f"pattern {self.pattern} prunes nothing: the first number is smaller")
            return self

        @property
        def final_sparsity(self) -> float:
            """What ``sparsity`` or ``pattern`` says."""
            if self.pattern is not None:
                return 1 - self.kept_of[0] / self.kept_of[1]
            return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

        @property
        def kept_of(self) -> tuple[int, int]:
            """N and M of the pattern."""
            kept, _, of = (self.pattern or "1:1").partition(":")
            return int(kept), int(of)

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
        self._choose(layers, self.config.final_sparsity)
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
        return self.config.final_sparsity * (1.0 - (1.0 - progress) ** 3)

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        return [
            module
            for name, module in model.named_modules()
            if isinstance(module, PRUNABLE)
            and (self.config.output_layer or not name.removeprefix("module.").startswith("heads."))
        ]

    def _choose(self, layers: list[nn.Module], sparsity: float) -> None:
        """Set the masks; weights pruned before are zero, hence the smallest, hence pruned again."""
        if self.config.pattern is not None:
            num_kept, of = self.config.kept_of
            gone = int(sparsity / self.config.final_sparsity * (of - num_kept) + 1e-6)
            for layer in layers:
                _mask(layer).copy_(_largest_of(_weight(layer).abs(), of, gone))
            return
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


def _largest_of(magnitudes: Tensor, of: int, gone: int) -> Tensor:
    """False at the ``gone`` smallest of each ``of`` in a row; exact with ties, too."""
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    rows_OI, flags_OI = magnitudes.flatten(1), keep.flatten(1)
    size = rows_OI.shape[1] // of * of
    order = rows_OI[:, :size].unflatten(1, (-1, of)).argsort(dim=2, stable=True)
    flags_OI[:, :size].unflatten(1, (-1, of)).scatter_(2, order[..., :gone], False)
    return flags_OI.view_as(magnitudes)


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("magnitude_prune", MagnitudePrune)
