"""Stage 2: training text -> tokens; utterances too short for their text are found here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.interfaces import UNK_ID
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    inputs = {"tokens": recipe.tokens.model_dump(mode="json"), "on_error": recipe.corpus.on_error}
    plan.add(
        Job(2, "tokens", layout.tokens, inputs, lambda out: run(recipe, layout, out), ("prepare", "features"))
    )


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Learn tokens from the recipe's transcripts, then hold every training cut's length against them.

    Raises:
        DataError: utterances too short for their text, and ``corpus.on_error`` is ``stop``.
    """
    from kdrecipe.corpus.manifests import check_lengths, transcripts
    from kdrecipe.corpus.problems import settle
    from kdrecipe.data.features import load_cuts
    from kdrecipe.data.tokens import Tokenizer

    cuts: Any = load_cuts(layout.features, "train")  # Lhotse's annotations do not let it be iterated
    subset = recipe.tokens.data
    ids = read_json(layout.features / "subsets.json")[subset] if subset else None
    texts = transcripts(layout.manifests, "train", ids)
    tokenizer = Tokenizer.train(sorted(set(texts)), recipe.tokens.name, recipe.tokens.vocab_size, out)
    problems = check_lengths(cuts, tokenizer, subsampling(recipe))
    out_ids = settle(problems, recipe.corpus.on_error)
    write_json(out / "left_out.json", sorted(out_ids))
    left_out = f"; {len(out_ids)} cuts are too short for their text and left out" if out_ids else ""
    print(f"  {len(tokenizer)} tokens, from {len(texts)} transcripts{left_out}", flush=True)
    unknown = sum(UNK_ID in tokenizer.encode(text) for text in transcripts(layout.manifests, "train"))
    if unknown:
        print(f"  {unknown} training transcripts have characters that no token stands for", flush=True)


def subsampling(recipe: Recipe) -> int:
    """Feature frames per frame of the encoder that leaves the fewest."""
    names = {system.model["name"] for system in recipe.systems.values() if system.model}
    return max((recipe.plugins.registry.get("architectures", name).subsampling for name in names), default=4)
