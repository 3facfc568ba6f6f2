"""From a recipe to its jobs: the one file that knows all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrecipe.jobs.plan import Plan
from kdrecipe.stages import (
    codebooks,
    compress,
    decode,
    export,
    features,
    guard,
    labels,
    lm,
    prepare,
    report,
    score,
    targets,
    texts,
    tokens,
    train,
    trials,
)
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe


def build_plan(recipe: Recipe, layout: Layout) -> Plan:
    """All jobs of a recipe, in order."""
    plan = _teachers(recipe, layout)
    _students(plan, recipe, layout)
    compress.add_jobs(plan, recipe, layout)
    export.add_jobs(plan, recipe, layout)
    decode.add_jobs(plan, recipe, layout)
    score.add_jobs(plan, recipe, layout)
    report.add_jobs(plan, recipe, layout)
    return plan


def trials_plan(recipe: Recipe, tried: Recipe, layout: Layout) -> Plan:
    """The jobs of ``--trials``, in order.

    Args:
        recipe: as it stands: all up to the teachers is its own.
        tried: the same with a system for each trial.
        layout: of ``recipe``.
    """
    plan = _teachers(recipe, layout)
    apart = Layout(layout.root, shared=frozenset([*recipe.teaching(), *recipe.writers]))
    _students(plan, tried, apart)
    trials.add_jobs(plan, tried, apart)
    return plan


def _teachers(recipe: Recipe, layout: Layout) -> Plan:
    """Stages 0 to 3, and what teachers write as labels, which no option of a student changes."""
    plan = Plan()
    prepare.add_jobs(plan, recipe, layout)
    features.add_jobs(plan, recipe, layout)
    train.add_writers(plan, recipe, layout)
    labels.add_jobs(plan, recipe, layout, 2)
    tokens.add_jobs(plan, recipe, layout)
    lm.add_jobs(plan, recipe, layout)
    texts.add_jobs(plan, recipe, layout)
    train.add_teachers(plan, recipe, layout)
    guard.add_jobs(plan, recipe, layout)
    labels.add_jobs(plan, recipe, layout, 4)
    return plan


def _students(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Targets, and whom they are for."""
    codebooks.add_jobs(plan, recipe, layout)
    targets.add_jobs(plan, recipe, layout)
    train.add_students(plan, recipe, layout)
