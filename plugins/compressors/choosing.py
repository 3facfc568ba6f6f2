"""Which units stay, and the shape of a model in which they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import UnitGroup
from kdrecipe.structure import ENCODER, Sizes, cut, drop_layers, unit_groups


def part_paths(parts: Sequence[str]) -> list[str]:
    """Paths of ``encoder`` and of heads by name."""
    return [part if part == ENCODER else f"heads.{part}" for part in parts]


def cut_out(
    model: nn.Module, groups: Sequence[UnitGroup], keep: Sequence[Tensor]
) -> tuple[dict[str, int], dict[str, float]]:
    """Cut all units but those of ``keep`` out of the model.

    Returns:
        Units left, by group; and for a report, the share of each kind that is left (``heads_kept``).
    """
    for group, units in zip(groups, keep, strict=True):
        cut(model, group, units)
    left = {group.name: len(units) for group, units in zip(groups, keep, strict=True)}
    kept: dict[str, float] = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        mine = [group for group in groups if group.kind == kind]
        kept[f"{kind}_kept"] = sum(left[g.name] for g in mine) / sum(g.size for g in mine)
    return left, kept


def floors(groups: Sequence[UnitGroup], at_least: float) -> list[int]:
    """Units of each group that stay in any case: this share, and one."""
    return [max(1, math.ceil(at_least * group.size)) for group in groups]


def fitting(
    groups: Sequence[UnitGroup],
    scores: Sequence[Tensor],
    sizes: Sizes,
    goal: int,
    least: Sequence[int],
    *,
    scope: str,
    by_cost: bool = False,
    multiple_of: int = 1,
) -> list[Tensor]:
    """The units of each group that stay if the least go, as few as leave ``goal`` parameters.

    Args:
        groups: of the model.
        scores: (size,) of each.
        sizes: of the model.
        goal: most parameters.
        least: units that stay of each group, see :func:`floors`.
        scope: ``per_group``: by the place among the units of a group; ``global``: by the score.
        by_cost: units of all groups are compared by score per parameter.
        multiple_of: so many units, or a multiple, stay of a group that loses some; heads may be any number.

    Raises:
        KdrecipeError: with what stays in any case there are more.
    """
    whole = [group.size for group in groups]
    steps = [1 if group.kind == "heads" else multiple_of for group in groups]
    ranks = [_ranks(number, groups, worth, sizes, scope, by_cost) for number, worth in enumerate(scores)]
    owner = torch.cat([torch.full((size,), number) for number, size in enumerate(whole)])
    order = torch.cat(ranks).argsort(stable=True)

    def left(gone: int) -> list[int]:
        counts = torch.bincount(owner[order[:gone]], minlength=len(groups)).tolist()
        wanted = [max(size - count, low) for size, count, low in zip(whole, counts, least, strict=True)]
        return [
            min(size, -(-number // step) * step)
            for size, number, step in zip(whole, wanted, steps, strict=True)
        ]

    low, high = 0, len(order)
    if sizes(left(high)) > goal:
        share = 1 - sizes(left(high)) / sizes(whole)
        raise KdrecipeError(
            f"so much can't be cut: with these kinds and at_least, {share:.0%} of what is there can go",
            remedy="add width to kinds, lower at_least, name more parts, or take a smaller share",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sizes(left(middle)) <= goal else (middle + 1, high)
    kept = _filled_up(left(low), steps, ranks, whole, lambda counts: sizes(counts) <= goal)
    return [
        rank.argsort(descending=True, stable=True)[:number].sort().values
        for rank, number in zip(ranks, kept, strict=True)
    ]


def _filled_up(
    kept: list[int],
    steps: Sequence[int],
    ranks: Sequence[Tensor],
    whole: Sequence[int],
    fits: Callable[[list[int]], bool],
) -> list[int]:
    """With more units while they fit, the best first: what a large unit left over, small ones take."""
    falling = [rank.sort(descending=True).values.tolist() for rank in ranks]
    open_groups = {number for number, size in enumerate(whole) if kept[number] < size}
    while open_groups:
        best = max(open_groups, key=lambda number: falling[number][kept[number]])
        more = list(kept)
        more[best] = min(whole[best], kept[best] + steps[best])
        if fits(more):
            kept = more
        if not fits(more) or kept[best] == whole[best]:
            open_groups.remove(best)
    return kept


def _ranks(
    number: int, groups: Sequence[UnitGroup], worth: Tensor, sizes: Sizes, scope: str, by_cost: bool
) -> Tensor:
    """(size,) by which the units of a group are compared with all others."""
    group, whole = groups[number], [group.size for group in groups]
    if scope == "per_group":
        place = torch.empty(group.size, dtype=torch.float64)
        place[worth.argsort(stable=True)] = torch.arange(group.size, dtype=torch.float64)
        return (place + 0.5) / group.size
    if not by_cost:
        return worth
    one_less = [size - (i == number) for i, size in enumerate(whole)]
    cost: int = sizes(whole) - sizes(one_less)
    return worth / max(1, cost)


def shaped(model: nn.Module, parts: Sequence[str], state: dict[str, Any]) -> nn.Module:
    """A model with as many layers and units as ``state`` says, whichever."""
    if state.get("layers"):
        drop_layers(model, range(state["layers"]))
    for group in unit_groups(model, parts):
        if group.name in state["units"]:
            cut(model, group, torch.arange(state["units"][group.name]))
    return model
