"""Stage 0: the raw corpus -> validated Lhotse manifests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from kdrecipe.artifacts import WhenAsked, raw_digest, write_json
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Prepared
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.checks import TRAIN
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the stage's one job."""
    corpus = recipe.corpus
    root = corpus.root
    inputs = {
        "corpus": corpus.name,
        "options": corpus.options,
        "on_error": corpus.on_error,
        "max_utterances": corpus.max_utterances,
        "plugin": recipe.plugins.registry.fingerprint("corpora", corpus.name),
        "root": str(root.resolve()) if root else None,  # the manifests name audio by absolute path
        # When asked for: a process that runs another job need not walk all audio.
        "raw": WhenAsked(partial(raw_digest, root)) if root and root.is_dir() else None,
        **({"case": corpus.case} if corpus.case != "keep" else {}),
        **({"without_text": found} if (found := _without_text(recipe)) else {}),
    }
    plan.add(
        Job(
            0,
            "prepare",
            layout.manifests,
            inputs,
            lambda out: run(recipe, root, out),
            in_place=True,
            sources=audio_elsewhere,
        )
    )


def audio_elsewhere(manifest_dir: Path) -> Iterator[Path]:
    """The audio files outside ``manifest_dir`` that its manifests name, each once."""
    from kdrecipe.corpus.manifests import audio_files

    folder = manifest_dir.absolute()
    named = dict.fromkeys(path for paths in audio_files(manifest_dir).values() for path in paths)
    return (path for path in named if not path.is_relative_to(folder))


def run(recipe: Recipe, root: Path | None, out: Path) -> None:
    """Prepare, validate, write.

    Raises:
        DataError: the corpus or a list of a subset's utterances is absent, or the corpus has
            mistakes and ``corpus.on_error`` is ``stop``.
    """
    from kdrecipe.corpus.fields import without_malformed
    from kdrecipe.corpus.manifests import audio_digests, finish, in_case, sample, validate_corpus

    corpus = recipe.corpus
    if root is not None and not root.is_dir():
        raise DataError(
            f"corpus.root is not a directory: {root}",
            where=corpus.location.where if corpus.location else "",
            remedy="set it to the directory of the corpus, in the file or with --set corpus.root=DIR",
        )
    for name in corpus.lists:
        path = corpus.list_path(name)
        if not path.exists():  # stage 1 reads it; better to know now
            raise DataError(
                f"the utterances of the subset {name!r} should be listed in {path}, which does not exist",
                where=corpus.lists[name].where,
                remedy="put it there, or say with listed_in: where it is",
            )
    cls = recipe.plugins.registry.get("corpora", corpus.name)
    plugin = cls(cls.Config.model_validate(corpus.options))
    prepared = returned(plugin.prepare(root, out), Prepared, f"corpus {corpus.name!r}", "prepare")
    _check_splits(recipe, prepared)
    prepared = without_malformed(prepared)
    if corpus.max_utterances is not None:
        prepared = sample(prepared, corpus.max_utterances)
    if corpus.case != "keep":
        prepared = in_case(prepared, corpus.case)
    prepared.problems += validate_corpus(prepared, without_text=_without_text(recipe))
    summary = finish(prepared, out, corpus.on_error)
    # The manifests may come out as they were while the audio did not: whoever reads them must know.
    write_json(out / "audio.json", audio_digests(out))
    for split, facts in summary.splits.items():
        speakers, hours = facts["speakers"], facts["hours"]
        print(f"  {split}: {facts['utterances']} utterances, {speakers} speakers, {hours:.2f} h")
    if summary.left_out:
        print(f"  left out: {len(summary.left_out)} (listed in {out / 'summary.json'})")
    for note in summary.notes:
        print(f"  note: {note}")


def _without_text(recipe: Recipe) -> list[str]:
    """Splits in which not all need a transcript: where a system hears some without. Stage 2 looks at those
    whose transcripts are used."""
    return [TRAIN] if any(system.unlabelled is not None for system in recipe.systems.values()) else []


def _check_splits(recipe: Recipe, prepared: Prepared) -> None:
    """What a corpus that can't name its splits beforehand shows only now."""
    absent = [
        split for split in dict.fromkeys((TRAIN, *recipe.decode.splits)) if split not in prepared.splits
    ]
    if absent:
        raise DataError(
            f"the corpus has no split {', '.join(map(repr, absent))}",
            where=recipe.document.where(("decode", "splits")),
            remedy=f"its splits: {', '.join(prepared.splits)}; {TRAIN} and decode.splits must be among them",
        )
