"""Stage 2, third job: what tokens and runtimes will make of the corpus's texts, told before any training.

``texts.json`` holds what the report must state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import sha256_file, write_json
from kdrecipe.errors import DataError, Problem
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.recipe.suitable import bundle_meta, exporters_for, origin_of
from kdrecipe.stages.layout import Layout
from kdrecipe.text import shown

if TYPE_CHECKING:
    from kdrecipe.data.tokens import Tokenizer

CHARACTERS_SHOWN = 10
SHARED = "the tokens"


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the job."""
    from kdrecipe.data.tokens import model_file

    exporters = sorted({name for _, name in _spelled(recipe)})
    bundles = {name: sha256_file(model_file(path)) for name, path in _bundles(recipe).items()}
    inputs = {
        "splits": recipe.decode.splits,
        "max_rewritten": recipe.parity.max_rewritten,
        "spelled": sorted(_spelled(recipe)),
        "plugins": {name: recipe.plugins.registry.fingerprint("exporters", name) for name in exporters},
        "bundles": bundles,
    }
    needs = ("prepare", "tokens")
    plan.add(Job(2, "texts", layout.texts, inputs, lambda out: run(recipe, layout, out), needs))


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Spell all texts by the tokens, and those that are scored as runtimes write them.

    Raises:
        DataError: of dev and ``decode.splits``, a runtime rewrites more than ``parity.max_rewritten``.
    """
    from kdrecipe.corpus.manifests import transcripts
    from kdrecipe.data.tokens import Tokenizer

    splits = dict.fromkeys(("train", "dev", *recipe.decode.splits))
    texts = {split: found for split in splits if (found := transcripts(layout.manifests, split))}
    tokenizers = {SHARED: Tokenizer.load(layout.tokens)}
    for name, path in _bundles(recipe).items():
        tokenizers[f"the tokens of {name}"] = Tokenizer.load(path)
    said: list[str] = []
    for whose, tokenizer in tokenizers.items():
        for split, listed in texts.items():
            if note := _lost(listed, split, whose, tokenizer):
                print(f"  {note}", flush=True)
                said += [note] if split in recipe.decode.splits else []
    problems = []
    for whose, name in _spelled(recipe):
        scored = {split: listed for split, listed in texts.items() if split != "train"}
        note, problem = _rewritten(recipe, name, tokenizers[whose], scored)
        if note:
            print(f"  {note}", flush=True)
            said.append(note)
        problems += [problem] if problem else []
    if problems:
        raise DataError(problems)
    write_json(out / "texts.json", {"notes": list(dict.fromkeys(said))})


def _bundles(recipe: Recipe) -> dict[str, Path]:
    """Pretrained system -> its bundle with tokens of its own, as far as it is there."""
    from kdrecipe.data.tokens import model_file

    found = {}
    for name, system in recipe.systems.items():
        if system.kind == "pretrained" and bundle_meta(system) is not None:
            path = Path(str(system.bundle))
            if model_file(path).is_file():
                found[name] = path
    return found


def _spelled(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Whose tokens, and an exporter that knows how its runtime writes them; each pair once."""
    registry = recipe.plugins.registry
    bundles = _bundles(recipe)
    pairs: dict[tuple[str, str], None] = {}
    for name in recipe.systems:
        model, origin = recipe.model_of(name), origin_of(recipe.systems, name)
        if model is None or origin is None or (origin.kind == "pretrained" and origin.name not in bundles):
            continue  # a bundle that is not there yet
        whose = f"the tokens of {origin.name}" if origin.name in bundles else SHARED
        for exporter in exporters_for(model, recipe.export, registry):
            if hasattr(registry.get("exporters", exporter.name), "speller"):
                pairs[whose, exporter.name] = None
    yield from pairs


def _lost(texts: Sequence[str], split: str, whose: str, tokenizer: Tokenizer) -> str:
    """What tokens can't give back of a split's texts, as a sentence; empty if they give back all."""
    spelled = {text: tokenizer.decode(tokenizer.encode(text)) for text in texts}
    lost = [text for text in texts if spelled[text] != text]
    if not lost:
        return ""
    characters: Counter[str] = Counter()
    for text in lost:
        characters += Counter(text.replace(" ", "")) - Counter(spelled[text].replace("<unk>", ""))
    counts = ", ".join(f"{shown(c)} {number}" for c, number in characters.most_common(CHARACTERS_SHOWN))
    example = min(lost, key=len)
    return (
        f"{len(lost)} of {len(texts)} {split} transcripts are not what {whose} can spell ({counts}): "
        f"{example!r} becomes {spelled[example]!r}"
    )


def _rewritten(
    recipe: Recipe, exporter: str, tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]
) -> tuple[str, Problem | None]:
    """What an exporter's runtime will write otherwise than the tokens spell, and whether that is too much."""
    from kdrecipe.measure.spelling import Spelling, speller_of

    cls: Any = recipe.plugins.registry.get("exporters", exporter)
    speller = speller_of(cls, tokenizer.pieces)
    assert speller is not None
    spelling = Spelling(tokenizer, speller, cls.runtime.name if cls.runtime else exporter)
    for listed in texts.values():
        for text in listed:
            spelling.foresee(text)
    if not spelling.rewritten:
        return "", None
    note = f"{exporter}, transcripts of {' and '.join(texts)}: {spelling.summary()}"
    limit = recipe.parity.max_rewritten
    return note, spelling.problem(f"export, {exporter}", limit) if spelling.rate > limit else None
