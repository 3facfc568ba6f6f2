"""Linear layers as products of two thin ones, by what they say on calibration data.

LiteASR (Kamahori et al. 2025, arXiv 2502.20583): what a layer writes lies near a plane of few dimensions; its
principal components on real audio are found and the layer is projected onto them, its mean kept by the bias.
Of all maps of that rank, this one has the least error on the data (a plain SVD has it on white noise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, Options

ROUNDS = 40  # of the bisection: beyond float32's precision


class LowRankLinear(nn.Module):
    """``nn.Linear`` of a given rank: ``first`` (I to r, without bias), then ``second`` (r to O)."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        y: Tensor = self.second(self.first(x))
        return y


@dataclass
class _Seen:
    """What a layer read: number of rows, their sum (I), and the sum of their outer products (I, I)."""

    count: int
    sum_I: Tensor
    products_II: Tensor


@dataclass(frozen=True)
class _Spectrum:
    """Principal components of what a layer writes: variances (O), falling, and directions (O, O)."""

    variances_O: Tensor
    directions_OO: Tensor
    mean_I: Tensor

    def rank(self, lost: float) -> int:
        """The least that loses no more than this share of the variance."""
        kept_O = self.variances_O.cumsum(0) / self.variances_O.sum().clamp(min=1e-30)
        return min(int((kept_O < 1 - lost).sum()) + 1, len(kept_O))


class LowRank:
    """Linear layers of low rank; which rank each has follows from the data and is its state."""

    tiny_options: ClassVar[dict[str, Any]] = {"epochs": 1}
    contract_options: ClassVar[dict[str, Any]] = {"share": 0.1, "epochs": 1}
    strength: ClassVar[str] = "share"

    class Config(Options):
        """Options.

        Args:
            share: of the parameters of ``parts`` that goes, 0 to 1. All layers lose the same share of their
                variance; those that would not become smaller stay whole.
            parts: ``encoder``, and heads by name.
            epochs: fine-tuning afterwards.
        """

        share: float = Field(default=0.3, ge=0.0, lt=1.0)
        parts: tuple[str, ...] = Field(default=("encoder",), min_length=1)
        epochs: int = Field(default=0, ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_epochs = config.epochs
        self._ranks: dict[str, int] = {}
        self._report: dict[str, float] = {}

    @torch.no_grad()
    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Look at the calibration data, find the ranks, factorise.

        Raises:
            KdrecipeError: no linear layers, no calibration data, or so much can't go.
        """
        layers = self._layers(model)
        before = sum(p.numel() for module in self._modules(model) for p in module.parameters())
        spectra = {
            name: _spectrum(layers[name], seen) for name, seen in _seen(model, layers, context).items()
        }
        self._ranks = _ranks(layers, spectra, self.config.share * before)
        for name, rank in self._ranks.items():
            _replace(model, name, _projected(layers[name], spectra[name], rank))
        after = sum(p.numel() for module in self._modules(model) for p in module.parameters())
        lost = [
            1 - float(spectra[n].variances_O[:r].sum() / spectra[n].variances_O.sum().clamp(min=1e-30))
            for n, r in self._ranks.items()
        ]
        self._report = {
            "layers": float(len(self._ranks)),
            "removed_share": 1 - after / before,
            "params": float(after),
            "lost_variance": max(lost, default=0.0),
        }
        return model

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Nothing: the ranks stay."""

    def finish(self, model: nn.Module) -> nn.Module:
        return model

    def state(self) -> dict[str, Any]:
        """``ranks`` by layer."""
        return {"ranks": self._ranks}

    def load_state(self, state: dict[str, Any]) -> None:
        """For :meth:`rebuild`."""
        self._ranks = state["ranks"]

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Layers of the same ranks, weights arbitrary."""
        for name, rank in self._ranks.items():
            linear: Any = model.get_submodule(name)
            new = LowRankLinear(linear.in_features, linear.out_features, rank)
            _replace(model, name, new.to(linear.weight.device))
        return model

    def report(self) -> dict[str, float]:
        """``layers`` of low rank, ``removed_share``, ``params`` of the parts, the most ``lost_variance``."""
        return self._report

    def _paths(self) -> list[str]:
        return [part if part == "encoder" else f"heads.{part}" for part in self.config.parts]

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        has = {"encoder", *(f"heads.{name}" for name, _ in model.get_submodule("heads").named_children())}
        if absent := [path for path in self._paths() if path not in has]:
            raise KdrecipeError(
                f"the model has no {absent[0]} to factorise", remedy=f"its parts: {', '.join(sorted(has))}"
            )
        return [model.get_submodule(path) for path in self._paths()]

    def _layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        # Only nn.Linear itself: a subclass is one because something reads its weights directly.
        found = {
            f"{path}.{name}": module
            for path, part in zip(self._paths(), self._modules(model), strict=True)
            for name, module in part.named_modules()
            if type(module) is nn.Linear
        }
        if not found:
            raise KdrecipeError(
                "low_rank finds no linear layers in the model",
                remedy="compress a float system, and give low_rank before int8 steps",
            )
        return found


@torch.no_grad()
def _seen(model: nn.Module, layers: Mapping[str, nn.Linear], context: CompressContext) -> dict[str, _Seen]:
    """What the layers read on calibration data; layers that do not run are left out."""
    found: dict[str, _Seen] = {}

    def keeper(name: str) -> Any:
        def keep(layer: nn.Module, args: Any) -> None:
            rows_NI = args[0].detach().flatten(0, -2).double()
            if name not in found:
                size = rows_NI.shape[1]
                found[name] = _Seen(0, rows_NI.new_zeros(size), rows_NI.new_zeros(size, size))
            seen = found[name]
            seen.count += len(rows_NI)
            seen.sum_I += rows_NI.sum(0)
            seen.products_II += rows_NI.t() @ rows_NI

        return keep

    was_training = model.training
    model.eval()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(keeper(name)).remove)
        for batch in context.calibration():
            model(batch.features_BTF, batch.lens_B, batch=batch)
    model.train(was_training)
    if not found:
        raise KdrecipeError(
            "there is no calibration data: neither dev nor the training data has an utterance",
            remedy="give the corpus a dev split",
        )
    return found


def _spectrum(layer: nn.Linear, seen: _Seen) -> _Spectrum:
    mean_I = seen.sum_I / seen.count
    covariance_II = seen.products_II / seen.count - mean_I[:, None] * mean_I
    weight_OI = layer.weight.detach().double()
    variances_O, directions_OO = torch.linalg.eigh(weight_OI @ covariance_II @ weight_OI.t())
    return _Spectrum(variances_O.flip(0).clamp(min=0), directions_OO.flip(1), mean_I)


def _ranks(
    layers: Mapping[str, nn.Linear], spectra: Mapping[str, _Spectrum], removed: float
) -> dict[str, int]:
    """Ranks of the layers that become smaller, together by at least ``removed`` parameters, if they can."""

    def ranks(lost: float) -> dict[str, int]:
        found = {name: spectrum.rank(lost) for name, spectrum in spectra.items()}
        return {name: rank for name, rank in found.items() if _saved(layers[name], rank) > 0}

    def saved(lost: float) -> int:
        return sum(_saved(layers[name], rank) for name, rank in ranks(lost).items())

    if removed <= 0:
        return {}
    if saved(1.0) < removed:
        total = sum(layer.weight.numel() for layer in layers.values())
        raise KdrecipeError(
            f"so much can't be removed: {saved(1.0) / total:.0%} of the linear layers can go, at rank 1",
            remedy="name more parts, or take a smaller share",
        )
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(middle) >= removed else (middle, high)
    return ranks(high)


def _saved(layer: nn.Linear, rank: int) -> int:
    """Parameters that a rank saves; a layer without a bias gets one."""
    new = rank * (layer.in_features + layer.out_features) + (layer.out_features if layer.bias is None else 0)
    return layer.weight.numel() - new


def _projected(layer: nn.Linear, spectrum: _Spectrum, rank: int) -> LowRankLinear:
    new = LowRankLinear(layer.in_features, layer.out_features, rank)
    weight_OI, kept_OR = layer.weight.detach().double(), spectrum.directions_OO[:, :rank]
    mean_O = weight_OI @ spectrum.mean_I
    bias_O = mean_O - kept_OR @ (kept_OR.t() @ mean_O)
    if layer.bias is not None:
        bias_O = bias_O + layer.bias.detach().double()
    new.first.weight.data = (kept_OR.t() @ weight_OI).to(layer.weight.dtype)
    new.second.weight.data = kept_OR.contiguous().to(layer.weight.dtype)
    new.second.bias.data = bias_O.to(layer.weight.dtype)
    return new.train(layer.training)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("low_rank", LowRank)
