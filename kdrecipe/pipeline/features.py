"""Stage 1: manifests -> cut sets with features, subsets of the training split, normalisation."""

from __future__ import annotations

from pathlib import Path

from kdrecipe.schema import Recipe
from kdrecipe.stages import Job, Layout, Plan


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    inputs = {"features": recipe.features.model_dump(mode="json"), "subsets": recipe.corpus.subsets}
    plan.add(
        Job(
            1,
            "features",
            layout.features,
            inputs,
            lambda out: run(recipe, layout, out),
            ("prepare",),
            in_place=True,
        )
    )


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Compute and store features."""
    import torch

    from kdrecipe.data.features import compute_features

    # The transforms are too small to share: two threads on two busy cores were 50 times slower than one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compute_features(layout.manifests, out, recipe.features.model_dump(), subsets=recipe.corpus.subsets)
    torch.set_num_threads(threads)
