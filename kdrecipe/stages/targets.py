"""Stage 4: what each teacher says about the training audio, once, on disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from kdrecipe.artifacts import read_json
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed whose targets are cached."""
    from kdrecipe.stages.inputs import all_needs

    for teacher in recipe.teaching():
        needs = all_needs(recipe, teacher)
        if not recipe.caches(teacher) or not needs:
            continue
        for seed in recipe.systems[teacher].seeds:
            name = f"{teacher}/seed{seed}"
            inputs = {"specs": [vars(need) for need in needs], "unlabelled": unlabelled(recipe, teacher)}
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


def unlabelled(recipe: Recipe, teacher: str) -> list[str]:
    """Subsets whose transcripts some student of ``teacher`` does not have."""
    students = [system for system in recipe.systems.values() if teacher in system.teachers]
    return sorted({system.unlabelled for system in students if system.unlabelled})


def run(recipe: Recipe, layout: Layout, teacher: str, seed: int, out: Path) -> None:
    """Run the teacher over all training cuts that some student learns from."""
    import torch

    from kdrecipe.data.batches import CutBatches
    from kdrecipe.data.features import load_cuts
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.stages.inputs import all_needs
    from kdrecipe.stages.session import target_key
    from kdrecipe.targets.cache import write_targets

    bundle = Bundle.load(layout.system(teacher, seed), recipe.plugins.registry)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuts = load_cuts(layout.features, "train")
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=120.0, seed=0, labelled_ids=None, shuffle=False
    )
    subsets: dict[str, list[str]] = read_json(layout.features / "subsets.json")
    write_targets(
        cuts,
        batches,
        bundle.model.to(device),
        all_needs(recipe, teacher),
        out,
        key_parts=target_key(bundle, recipe),
        own_ids={cut for name in unlabelled(recipe, teacher) for cut in subsets[name]},
    )
