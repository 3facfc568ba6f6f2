"""Stage 2: training text -> tokens; utterances too short for their text are found here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import fingerprint, read_json, write_json
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout

LENGTHS = range(50, 450)  # feature frames, at which encoders are asked what they leave of them


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    fewest = fewest_frames(recipe)
    inputs = {
        "tokens": recipe.tokens.model_dump(mode="json"),
        "on_error": recipe.corpus.on_error,
        "frames": fingerprint([fewest(num_frames) for num_frames in LENGTHS]),
    }
    needs = ("prepare", "features")
    plan.add(Job(2, "tokens", layout.tokens, inputs, lambda out: run(recipe, layout, out), needs))


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
    texts = transcripts(layout.manifests, "train", ids) or transcripts(layout.manifests, "dev")
    tokenizer = Tokenizer.train(sorted(set(texts)), recipe.tokens.name, recipe.tokens.vocab_size, out)
    problems = check_lengths(cuts, tokenizer, fewest_frames(recipe))
    out_ids = settle(problems, recipe.corpus.on_error)
    write_json(out / "left_out.json", sorted(out_ids))
    left_out = f"; {len(out_ids)} cuts are too short for their text and left out" if out_ids else ""
    print(f"  {len(tokenizer)} tokens, from {len(texts)} transcripts{left_out}", flush=True)


def fewest_frames(recipe: Recipe) -> Callable[[int], int]:
    """Feature frames -> frames that the encoder gives which leaves the fewest, of all systems that train.

    Encoders are built, not initialised, since an option may decide how much one subsamples.
    """
    from kdrecipe.recipe.fit import build_encoder

    models = [system.model for system in recipe.systems.values() if system.model]
    distinct = {json.dumps({k: v for k, v in m.items() if k != "heads"}, sort_keys=True): m for m in models}
    bins = recipe.features.num_mel_bins
    built = [build_encoder(recipe.plugins.registry, model, bins) for model in distinct.values()]
    return lambda num_frames: min((e.output_len(num_frames) for e in built), default=num_frames)
