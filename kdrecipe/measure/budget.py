"""Finds the strength of compression at which a model costs what it may cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import KdrecipeError

if TYPE_CHECKING:
    from kdrecipe.corpus.audio import Utterance
    from kdrecipe.model.bundle import Bundle

TOLERANCE = 0.02
"""A budget is met from 0 to so much below."""
CLOSE = 0.002
"""So near below, the search ends."""
STRONGEST = 0.98
MAX_TRIALS = 16
NUM_UTTERANCES = 10
"""On which ``rtf`` is measured."""
REPEATS = 3


@dataclass(frozen=True)
class Found:
    """What met a budget.

    Args:
        strength: of the steps.
        value: what the model costs.
        trials: models that were looked at.
    """

    strength: float
    value: float
    trials: int


def meet(cost: Callable[[float], float], limit: float, name: str, where: str = "") -> Found:
    """The least strength at which ``cost`` is within ``limit``, by bisection.

    Args:
        cost: of a strength from 0 to below 1; falls as it grows. KdrecipeError: so strong is impossible.
        limit: of the cost.
        name: of the cost, in errors.
        where: in errors.

    Raises:
        KdrecipeError: no strength has a cost from 0 to 2 % below the limit; it says the nearest.
    """
    tried: dict[float, float | None] = {}
    refused: list[KdrecipeError] = []

    def value(strength: float) -> float | None:
        try:
            tried[strength] = cost(strength)
        except KdrecipeError as error:
            if strength == 0:
                raise  # it is not the strength that it fails of
            refused.append(error)
            tried[strength] = None
        return tried[strength]

    weak, strong = 0.0, STRONGEST
    at_rest = value(weak)
    if at_rest is not None and at_rest > limit:
        value(strong)
        while len(tried) < MAX_TRIALS and not _is_close(tried, limit):
            middle = (weak + strong) / 2
            found = value(middle)
            weak, strong = (middle, strong) if found is not None and found > limit else (weak, middle)
    known = {strength: cost for strength, cost in tried.items() if cost is not None}
    within = {strength: cost for strength, cost in known.items() if cost <= limit}
    if within:
        best = max(within, key=lambda strength: within[strength])
        if within[best] >= (1 - TOLERANCE) * limit:
            return Found(best, within[best], len(tried))
    raise KdrecipeError(_nearest(known, limit, name), where=where, remedy=_remedy(known, limit, refused))


def _is_close(tried: dict[float, float | None], limit: float) -> bool:
    return any(cost is not None and (1 - CLOSE) * limit <= cost <= limit for cost in tried.values())


def _nearest(known: dict[float, float], limit: float, name: str) -> str:
    below = max((c for c in known.values() if c <= limit), default=None)
    above = min((c for c in known.values() if c > limit), default=None)
    if above is None:
        return f"{name} is {_figure(known[0.0])} without compression, below the budget of {_figure(limit)}"
    what = f"the budget of {name} {_figure(limit)} can't be met: the nearest "
    return what + (
        f"is {_figure(above)}"
        if below is None
        else f"are {_figure(below)} and {_figure(above)}, where one step more or less is taken"
    )


def _remedy(known: dict[float, float], limit: float, refused: Sequence[KdrecipeError]) -> str:
    if all(cost <= limit for cost in known.values()):
        return "the parent meets it: leave the budget out, or take a larger parent"
    if refused and all(cost > limit for cost in known.values()):
        problem = refused[-1].problems[0]
        return f"{problem.what}; {problem.remedy}" if problem.remedy else problem.what
    return "change the budget to one of these, or let other steps or options have a part in it"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def cost_of(
    bundle: Bundle,
    measure: str,
    exporter: Any,
    utterances: Sequence[Utterance] = (),
) -> float:
    """What a bundle costs, in the units of :class:`kdrecipe.recipe.budget.Budget`.

    Args:
        bundle: on disk.
        measure: ``params``, ``macs_per_s``, ``size_mb`` or ``rtf``.
        exporter: that is measured, for the last two.
        utterances: on which time is measured.
    """
    from kdrecipe.measure.macs import macs_per_second

    if measure == "params":
        return float(bundle.meta["params"])
    if measure == "macs_per_s":
        return macs_per_second(bundle.model, bundle.meta["features"])
    with tempfile.TemporaryDirectory() as name:
        directory, variant = Path(name), exporter.ships(bundle.number_formats)
        exporter.export(bundle, directory)
        if measure == "size_mb":
            files = exporter.files[variant].values()
            return float(sum((directory / file).stat().st_size for file in files)) / 1e6
        from kdrecipe.measure.runtime import measure_export

        return min(
            measure_export(exporter, directory, variant, utterances).rtf_median for _ in range(REPEATS)
        )
