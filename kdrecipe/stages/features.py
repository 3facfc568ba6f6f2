"""Stage 1: manifests -> cut sets with features, subsets of the training split, normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrecipe.artifacts import fingerprint, read_json
from kdrecipe.corpus.subsets import read_ids
from kdrecipe.errors import DataError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.long_utterances import tell_long_utterances


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    corpus = recipe.corpus
    inputs: dict[str, Any] = {
        "features": recipe.features.model_dump(mode="json"),
        "subsets": corpus.subsets,
    }
    if corpus.lists:
        inputs["lists"] = {name: _digest(corpus.list_path(name)) for name in corpus.lists}
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


def _digest(path: Path) -> str | None:
    """Of the ids that are listed there; None: there are none, which the job itself tells."""
    try:
        return fingerprint(read_ids(path))
    except DataError:
        return None


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Compute and store features."""
    import torch

    from kdrecipe.data.features import compute_features

    # The transforms are too small to share: two threads on two busy cores were 50 times slower than one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    corpus = recipe.corpus
    listed = {name: corpus.list_path(name) for name in corpus.lists}
    rules = corpus.subsets | {name: {"listed_in": str(path)} for name, path in listed.items()}
    compute_features(layout.manifests, out, recipe.features.model_dump(), subsets=rules)
    tell_long_utterances(recipe, out)
    torch.set_num_threads(threads)
    chosen = read_json(out / "subsets.json")
    for name, path in listed.items():
        found = set(read_ids(path)) & set(chosen[name])
        print(f"  subset {name}: {len(found)} of the {len(read_ids(path))} utterances listed in {path}")
