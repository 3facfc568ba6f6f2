"""Stage 4: what each teacher says about the training audio, once, on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed whose targets are cached."""
    from kdrecipe.stages.inputs import all_needs, model_plugins, students_of

    for teacher in recipe.teaching():
        needs = all_needs(recipe, teacher)
        if not recipe.caches(teacher) or not needs:
            continue
        for seed in recipe.systems[teacher].seeds:
            name = f"{teacher}/seed{seed}"
            parts = {(s.data, s.unlabelled) for s in students_of(recipe, teacher)}
            inputs = {
                "specs": [vars(need) for need in needs],
                "parts": sorted(parts, key=str),
                "model": model_plugins(recipe, teacher),
            }
            plan.add(
                Job(
                    4,
                    f"targets/{name}",
                    layout.targets(teacher, seed),
                    inputs,
                    partial(run, recipe, layout, teacher, seed),
                    ("features", "tokens", name),
                    in_place=True,
                    alone=False,
                )
            )


def run(recipe: Recipe, layout: Layout, teacher: str, seed: int, out: Path) -> None:
    """Run the teacher over the training cuts that some student learns from, and no others."""
    from kdrecipe.data.batches import CutBatches
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.stages.inputs import all_needs, students_of
    from kdrecipe.stages.session import target_key, training_data
    from kdrecipe.targets.cache import write_targets
    from kdrecipe.train.distribution import local_device

    bundle = Bundle.load(layout.system(teacher, seed), recipe.plugins.registry)
    shifts_s = {spec.key: spec.frame_shift_s for spec in bundle.info.provides()}
    cuts, labelled, unlabelled = training_data(layout, students_of(recipe, teacher))
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=120.0, seed=0, labelled_ids=labelled, shuffle=False
    )
    write_targets(
        cuts,
        batches,
        bundle.model.to(local_device()),
        [replace(need, frame_shift_s=shifts_s[need.key]) for need in all_needs(recipe, teacher)],
        out,
        key_parts=target_key(bundle, recipe),
        own_ids=unlabelled,
    )
