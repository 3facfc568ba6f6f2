"""What the units of a model are worth: three scores, all taken where units are read.

Without the weights that read it, a unit is as good as gone; so what these weights make of it is its worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, UnitGroup
from kdrecipe.structure import layers_of, per_unit, read_at

Score = Literal["magnitude", "activation", "taylor"]


def unit_scores(
    model: nn.Module, groups: Sequence[UnitGroup], score: Score, context: CompressContext
) -> list[Tensor]:
    """Per group (size,) float64 on the CPU, higher is worth more.

    ``magnitude``: squares of the weights that read a unit. ``activation``: these times the mean square of
    what they read on calibration data (Sun et al. 2023, arXiv 2306.11695, for units), about the energy that
    the unit passes on. Both are relative to the mean of the group. ``taylor``: the squared change of the
    loss, to first order, if the unit were gone (Molchanov et al. 2019, arXiv 1906.10771), over batches; it
    compares units of all groups.
    """
    if score == "taylor":
        return _taylor(model, groups, context)
    energies = _energies(model, groups, context) if score == "activation" else {}
    found = []
    for number, group in enumerate(groups):
        worth = torch.zeros(group.size, dtype=torch.float64)
        for part, layer in read_at(model, group):
            columns = _reading_weight(layer).detach().double().square().sum(0).cpu()
            worth += per_unit(part, group.size, columns * energies.get((number, part.layer), 1.0))
        found.append(worth / worth.mean().clamp(min=1e-30))
    return found


def _reading_weight(layer: Any) -> Tensor:
    """(O, I) of a layer that reads."""
    weight: Any = layer.weight_ih_l0 if isinstance(layer, nn.LSTM) else layer.weight
    return weight  # type: ignore[no-any-return]


@torch.no_grad()
def _energies(
    model: nn.Module, groups: Sequence[UnitGroup], context: CompressContext
) -> dict[tuple[int, str], Tensor]:
    """(number of the group, layer) -> (I,) mean square of what it reads."""
    sums: dict[tuple[int, str], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}

    def keeper(key: tuple[int, str]) -> Any:
        def keep(layer: nn.Module, args: Any) -> None:
            rows_NI = args[0].detach().flatten(0, -2)
            sums[key] = sums.get(key, 0) + rows_NI.double().square().sum(0).cpu()
            counts[key] = counts.get(key, 0) + len(rows_NI)

        return keep

    with ExitStack() as hooks:
        for number, group in enumerate(groups):
            for part, layer in read_at(model, group):
                hooks.callback(layer.register_forward_pre_hook(keeper((number, part.layer))).remove)
        _run(model, context)
    # a layer that no calibration text reaches (of a head that needs one) counts by its weights
    return {key: total / counts[key] for key, total in sums.items()}


@torch.no_grad()
def layer_influence(model: nn.Module, context: CompressContext) -> list[float]:
    """How much each layer of the encoder changes what passes through it: 1 - cosine of its input and output,
    over frames (block influence, Men et al. 2024, arXiv 2403.03853)."""
    layers = layers_of(model)
    sums, counts = [0.0] * len(layers), [0] * len(layers)

    def keeper(number: int) -> Any:
        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            if args[0].shape != output.shape:
                return
            similar = torch.cosine_similarity(args[0].float(), output.float(), dim=-1)
            sums[number] += float((1 - similar).sum())
            counts[number] += similar.numel()

        return keep

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(keeper(number)).remove)
        _run(model, context)
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def _run(model: nn.Module, context: CompressContext) -> None:
    """The model over all calibration data, in evaluation mode."""
    was_training, count = model.training, 0
    model.eval()
    for batch in context.calibration():
        model(batch.features_BTF, batch.lens_B, batch=batch)
        count += 1
    model.train(was_training)
    if not count:
        raise KdrecipeError(
            "there is no calibration data: neither dev nor the training data has an utterance",
            remedy="choose score: magnitude, or give the corpus a dev split",
        )


def _taylor(model: nn.Module, groups: Sequence[UnitGroup], context: CompressContext) -> list[Tensor]:
    found = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    count = 0
    for _ in context.gradients(model):
        count += 1
        for worth, group in zip(found, groups, strict=True):
            change = torch.zeros(group.size, dtype=torch.float64)
            for part, layer in read_at(model, group):
                weight = _reading_weight(layer)
                if weight.grad is not None:
                    columns = (weight.detach().double() * weight.grad.double()).sum(0).cpu()
                    change += per_unit(part, group.size, columns)
            worth += change.square()
    return [worth / max(1, count) for worth in found]
