"""Stage 2: training text -> tokens; utterances too short for their text are found here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrecipe.artifacts import write_json
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    inputs = {"tokens": recipe.tokens.model_dump(mode="json"), "on_error": recipe.corpus.on_error}
    plan.add(Job(2, "tokens", layout.tokens, inputs, lambda out: run(recipe, layout, out), ("features",)))


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Train tokens on the training split's text, then hold every training cut's length against it.

    Raises:
        DataError: utterances too short for their text, and ``corpus.on_error`` is ``stop``.
    """
    from kdrecipe.corpus.manifests import check_lengths
    from kdrecipe.corpus.problems import settle
    from kdrecipe.data.features import load_cuts
    from kdrecipe.data.tokens import Tokenizer

    cuts: Any = load_cuts(layout.features, "train")  # Lhotse's annotations do not let it be iterated
    texts = sorted({s.text for c in cuts for s in c.supervisions if s.text})
    tokenizer = Tokenizer.train(texts, recipe.tokens.name, recipe.tokens.vocab_size, out)
    problems = check_lengths(cuts, tokenizer, subsampling(recipe))
    out_ids = settle(problems, recipe.corpus.on_error)
    write_json(out / "left_out.json", sorted(out_ids))
    left_out = f"; {len(out_ids)} cuts are too short for their text and left out" if out_ids else ""
    print(f"  {len(tokenizer)} tokens{left_out}", flush=True)


def subsampling(recipe: Recipe) -> int:
    """Feature frames per frame of the encoder that leaves the fewest."""
    names = {system.model["name"] for system in recipe.systems.values() if system.model}
    return max((recipe.plugins.registry.get("architectures", name).subsampling for name in names), default=4)
