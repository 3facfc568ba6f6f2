"""What every corpus must hold to, on a raw corpus that the caller gives (or that it synthesises)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrecipe.interfaces import Prepared
from kdrecipe.testing.checks import by_id, check_config_strict, require
from kdrecipe.testing.corpus import Layout, make_corpus
from kdrecipe.text import clean, control_characters, shown

LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "manifests": ("manifests", ()),
    "folders": ("folders", ()),
    "an4": ("an4", ()),
    "librispeech": ("librispeech", ("train-clean-100", "dev-clean", "test-clean")),
    "mini_librispeech": ("librispeech", ("train-clean-5", "dev-clean-2")),
}
"""Corpora whose raw form :func:`kdrecipe.testing.corpus.make_corpus` can write: layout and parts."""


@dataclass
class CorpusCase:
    """A corpus class under test, with its options.

    Args:
        cls: the class.
        config: its options.
        corpus_dir: the raw corpus; None for one that is synthesised.
        work_dir: where synthesised audio may go.
    """

    cls: Any
    config: Any
    corpus_dir: Path | None
    work_dir: Path

    def prepare(self, name: str = "first") -> Prepared:
        """Prepare into a directory of that name (once)."""
        done: dict[str, Prepared] = self.__dict__.setdefault("_done", {})
        if name not in done:
            out_dir = self.work_dir / name
            out_dir.mkdir(parents=True, exist_ok=True)
            done[name] = self.cls(self.config).prepare(self.corpus_dir, out_dir)
        return done[name]


def tiny_raw_corpus(name: str, directory: Path) -> Path | None:
    """A raw corpus in the layout that the corpus ``name`` reads; None if there is no such layout here."""
    if name not in LAYOUTS:
        return None
    layout, parts = LAYOUTS[name]
    return make_corpus(directory, num_speakers=9, utterances_per_speaker=1, layout=layout, parts=parts)


def scratch_dir() -> tempfile.TemporaryDirectory[str]:
    """A directory for a case, removed with its object."""
    return tempfile.TemporaryDirectory(prefix="kdrecipe-contract-")


def _listed(manifest: Any) -> list[Any]:
    return list(manifest)


def check_splits_present(case: CorpusCase) -> None:
    """There is ``train`` and at least one split to test on; each has audio for all its texts."""
    splits = case.prepare().splits
    require("train" in splits, f"there is no split train, only {', '.join(splits)}")
    require(len(splits) > 1, "there is no split besides train")
    for name, (recordings, supervisions) in splits.items():
        require(len(supervisions) > 0, f"the split {name} is empty")
        ids = {recording.id for recording in _listed(recordings)}
        lost = [s.id for s in _listed(supervisions) if s.recording_id not in ids]
        require(not lost, f"{name}: no recording for {', '.join(lost[:3])}")


def check_speakers_disjoint(case: CorpusCase) -> None:
    """Every utterance has a speaker, and no speaker is in two splits."""
    home: dict[str, str] = {}
    for name, (_, supervisions) in case.prepare().splits.items():
        for sup in _listed(supervisions):
            require(bool(sup.speaker), f"{sup.id} has no speaker")
            where = home.setdefault(sup.speaker, name)
            require(where == name, f"speaker {sup.speaker} is in {where} and in {name}")


def check_deterministic(case: CorpusCase) -> None:
    """Preparing twice gives the same utterances, in the same order."""
    for name in case.prepare().splits:
        first, second = (
            [
                (s.id, s.text, s.speaker, round(s.duration, 4))
                for s in _listed(case.prepare(which).splits[name][1])
            ]
            for which in ("first", "second")
        )
        require(first == second, f"the split {name} differs from run to run")


def check_validates(case: CorpusCase) -> None:
    """All audio decodes at 16 kHz and holds its transcripts; a sound corpus shows no problems."""
    from kdrecipe.corpus.manifests import validate_corpus

    prepared = case.prepare()
    found = [*prepared.problems, *validate_corpus(prepared)]
    problems = [problem for problem in found if not getattr(problem, "is_note", False)]
    require(not problems, f"{len(problems)} problems, the first: {problems[0] if problems else ''}")


def check_texts_clean(case: CorpusCase) -> None:
    """Texts are as ``kdrecipe.text.clean`` writes them, without markup or control characters."""
    for _, supervisions in case.prepare().splits.values():
        for sup in _listed(supervisions):
            text = sup.text or ""
            require(bool(text), f"{sup.id} has no text")
            require(not set(text) & set("<>()[]{}_\\"), f"{sup.id}: markup in {text!r}")
            require(
                text == clean(text), f"{sup.id}: {text!r} has stray white space or is not in normal form C"
            )
            controls = control_characters(text)
            require(not controls, f"{sup.id}: control characters in its text: {shown(controls)}")


CORPUS_CHECKS = by_id(
    check_splits_present,
    check_speakers_disjoint,
    check_deterministic,
    check_validates,
    check_texts_clean,
    check_config_strict,
)
"""Contract of a corpus, by check id."""
