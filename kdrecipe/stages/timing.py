"""How long jobs took before: from their stamps, or from the recipe's committed table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json
from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.forecast import Forecast
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import seconds_of
from kdrecipe.stages import STAGES

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe


def seconds_before(recipe: Recipe, plan: Plan) -> dict[str, float]:
    """Seconds by job, of the jobs that ran before, on this machine or on that of the committed table.

    A profile or ``--set`` changes the times, so the table is used only for the recipe as it stands.
    """
    stamped = {name: seconds_of(job) for name, job in plan.jobs.items()}
    here = {name: seconds for name, seconds in stamped.items() if seconds is not None}
    return {**published(recipe.dir / "results.json"), **here} if recipe.as_it_stands else here


def published(path: Path) -> dict[str, float]:
    """Seconds by job from a ``results.json``; empty if it is missing or can't be read."""
    try:
        results: Any = read_json(path)
        trained = {
            f"{row['name']}/seed{seed}": run["seconds"]
            for row in results["systems"]
            for seed, run in zip(row["seeds"], (row["train"] or {}).get("by_seed", ()), strict=False)
        }
        found = {**trained, **results.get("seconds", {})}  # null where a stamp did not say
        return {name: float(seconds) for name, seconds in found.items() if isinstance(seconds, int | float)}
    except (KdrecipeError, LookupError, TypeError, AttributeError):
        return {}


def outlook(forecast: Forecast) -> str:
    """The first line of a run: how many jobs of which stages, and how long they take if that is known."""
    count = Counter(job.stage for job in forecast.jobs)
    stages = ", ".join(f"{STAGES[stage][0]} {number}" for stage, number in sorted(count.items()))
    jobs = f"{len(forecast.jobs)} job{'s' if len(forecast.jobs) != 1 else ''} to run ({stages})"
    time = forecast.text()
    if not time:
        trains = {"teacher", "distill"} & {STAGES[stage][0] for stage in count}
        later = ": training will tell what it has left" if trains else ""
        return f"{jobs}; how long they take is not known{later}"
    return f"{jobs}: {time}, by what such jobs took before"
