"""Stage 2: training text -> tokens; utterances too short for their text are found here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdrecipe.artifacts import fingerprint, read_json, write_json
from kdrecipe.errors import RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.imported import build_teacher, tokenizer_file
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.labels import hypotheses_jobs, labels_inputs, training_texts
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.data.stored_cuts import StoredCuts

LENGTHS = range(50, 450)  # feature frames, at which encoders are asked what they leave of them


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    fewest, tokens = fewest_frames(recipe), recipe.tokens
    taken = {"teacher", "keep"} if tokens.teacher else set()
    inputs = {
        "tokens": tokens.model_dump(mode="json", include={"name", "vocab_size", "data", *taken}),
        "on_error": recipe.corpus.on_error,
        "frames": fingerprint([fewest(num_frames) for num_frames in LENGTHS]),
        **({"labels": labels_inputs(recipe, tokens)} if tokens.labels else {}),
    }
    needs = ("prepare", "features", *hypotheses_jobs(recipe, tokens))
    plan.add(
        Job(
            2,
            "tokens",
            layout.tokens,
            inputs,
            lambda out: run(recipe, layout, out),
            needs,
            sources=lambda out: [own_tokens(recipe)] if tokens.teacher else [],
        )
    )


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Learn tokens from the recipe's texts, then hold every training cut's length against them.

    Raises:
        DataError: utterances without a transcript, or too short for it, and ``corpus.on_error`` is ``stop``.
    """
    from kdrecipe.corpus.manifests import check_lengths, check_texts
    from kdrecipe.corpus.problems import settle
    from kdrecipe.data.tokens import Tokenizer

    texts = training_texts(recipe, layout, recipe.tokens)
    distinct, kind = sorted(set(texts)), recipe.tokens.name
    if kind == "from_teacher":
        tokenizer = Tokenizer.trimmed(own_tokens(recipe), distinct, out)
        note = _capitals(distinct)
    else:
        tokenizer, note = Tokenizer.train(distinct, kind, recipe.tokens.vocab_size, out), ""
    cuts = _labelled(recipe, layout)
    problems = check_texts(cuts) + check_lengths(cuts, tokenizer, fewest_frames(recipe))
    out_ids = settle(problems, recipe.corpus.on_error)
    write_json(out / "left_out.json", sorted(out_ids))
    left_out = f"; {len(out_ids)} cuts are too short for their text and left out" if out_ids else ""
    what = f"hypotheses of {recipe.tokens.labels}" if recipe.tokens.labels else "transcripts"
    print(f"  {len(tokenizer)} tokens, from {len(texts)} {what}{left_out}", flush=True)
    if note:
        print(f"  note: {note}", flush=True)


def own_tokens(recipe: Recipe) -> Path:
    """The file of the teacher's tokens that the recipe trims.

    Raises:
        RecipeError: it is not there.
    """
    assert recipe.tokens.teacher is not None
    system = recipe.systems[recipe.tokens.teacher]
    path = tokenizer_file(build_teacher(recipe.plugins.registry, system))
    if path is None:
        raise RecipeError(
            f"{system.name!r} has no tokens that can be taken: there is no tokenizer.json",
            where=recipe.document.where(("tokens", "teacher")),
            remedy="put the tokeniser of the model beside its weights",
        )
    return path


def _labelled(recipe: Recipe, layout: Layout) -> StoredCuts:
    """The training cuts whose transcripts some system uses."""
    from kdrecipe.data.features import load_cuts
    from kdrecipe.stages.inputs import utterances_of

    cuts = load_cuts(layout.features, "train")
    subsets = read_json(layout.features / "subsets.json")
    used = cuts.chosen(())
    for system in recipe.systems.values():
        if system.learns:
            used = used | utterances_of(system, cuts, subsets, ())[0]
    return cuts.select(used)


def _capitals(texts: Sequence[str]) -> str:
    """A note if all texts are in capitals, which a teacher of mixed case spells letter by letter."""
    if all(text.isupper() for text in texts):
        return "transcripts in capitals take half as many tokens again: set corpus: {case: lower}"
    return ""


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
