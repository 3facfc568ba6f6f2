"""Stage 4: what each teacher says about the training audio, once, on disk."""

from __future__ import annotations

from pathlib import Path

from kdrecipe.schema import Recipe
from kdrecipe.stages import Job, Layout, Plan


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed whose targets are cached."""
    from kdrecipe.train.inputs import all_needs

    for teacher in recipe.teaching():
        needs = all_needs(recipe, teacher)
        if not recipe.caches(teacher) or not needs:
            continue
        for seed in recipe.systems[teacher].seeds:
            name = f"{teacher}/seed{seed}"
            inputs = {"specs": [vars(need) for need in needs]}
            plan.add(
                Job(
                    4,
                    f"targets/{name}",
                    layout.targets(teacher, seed),
                    inputs,
                    _writer(recipe, layout, teacher, seed),
                    ("features", "tokens", name),
                    in_place=True,
                )
            )


def _writer(recipe: Recipe, layout: Layout, teacher: str, seed: int):  # type: ignore[no-untyped-def]
    return lambda out: run(recipe, layout, teacher, seed, out)


def run(recipe: Recipe, layout: Layout, teacher: str, seed: int, out: Path) -> None:
    """Run the teacher over all training cuts that some student learns from."""
    import torch
    from lhotse import CutSet

    from kdrecipe.bundle import Bundle
    from kdrecipe.data.batches import CutBatches
    from kdrecipe.data.targets import write_targets
    from kdrecipe.train.inputs import all_needs

    bundle = Bundle.load(layout.system(teacher, seed), recipe.plugins.registry)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuts = CutSet.from_file(layout.features / "train.jsonl.gz").to_eager()
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=120.0, seed=0, labelled_ids=None, shuffle=False
    )
    write_targets(
        cuts,
        batches,
        bundle.model.to(device),
        all_needs(recipe, teacher),
        out,
        key_parts={
            "teacher": bundle.hash,
            "tokens": bundle.meta["vocab_id"],
            "features": recipe.features.model_dump(mode="json"),
        },
    )
