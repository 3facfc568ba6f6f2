"""Any corpus that already has Lhotse manifests (``.jsonl`` or ``.jsonl.gz``), one pair per split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from kdrecipe import hookimpl
from kdrecipe.corpus.fields import wrong_field
from kdrecipe.corpus.gather import read_lines
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import SAMPLE_RATE, Options, Prepared


class Manifests:
    """Corpus ``manifests``."""

    class Config(Options):
        """Options of the corpus.

        Args:
            splits: split -> its name in the files, which replaces ``{part}`` below.
            recordings: file of the recordings, relative to the corpus's root.
            supervisions: file of the supervisions, relative to the corpus's root.
            resample: bring audio of other sampling rates to 16 kHz while it is read.
            channel: use only utterances that name this channel, and it alone of those that name several;
                null: each must name one.
        """

        splits: dict[str, str] = {"train": "train", "dev": "dev", "test": "test"}
        recordings: str = "{part}_recordings.jsonl.gz"
        supervisions: str = "{part}_supervisions.jsonl.gz"
        resample: bool = False
        channel: int | None = Field(default=None, ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.split_names = tuple(config.splits)

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """The manifests as they are; relative audio paths are taken from ``corpus_dir``.

        Raises:
            DataError: if there is no root, a manifest file is absent, or nothing names the channel.
        """
        if corpus_dir is None:
            raise DataError(
                "corpus 'manifests' needs a root", where="corpus", remedy="set corpus.root to their folder"
            )
        corpus_dir = corpus_dir.absolute()
        from lhotse.audio import Recording, RecordingSet
        from lhotse.supervision import SupervisionSegment, SupervisionSet

        files = {
            split: tuple(
                corpus_dir / name.replace("{part}", part)
                for name in (self.config.recordings, self.config.supervisions)
            )
            for split, part in self.config.splits.items()
        }
        absent = [path for pair in files.values() for path in pair if not path.is_file()]
        if absent:
            remedy = "check corpus.root, or name the files with corpus.recordings and corpus.supervisions"
            raise DataError(Problem("no such manifest", str(path), remedy) for path in absent)
        prepared = Prepared({})
        for split, (recordings_file, supervisions_file) in files.items():
            recordings = [
                self._located(recording, corpus_dir)
                for recording in _read(recordings_file, Recording.from_dict, prepared.problems)
            ]
            supervisions = _read(supervisions_file, SupervisionSegment.from_dict, prepared.problems)
            supervisions = self._of_channel(supervisions, split, supervisions_file, prepared.notes)
            prepared.splits[split] = (
                RecordingSet.from_recordings(recordings),
                SupervisionSet.from_segments(supervisions),
            )
        return prepared

    def _of_channel(self, supervisions: list[Any], split: str, path: Path, notes: list[str]) -> list[Any]:
        """The utterances of the chosen channel, each with it alone."""
        wanted = self.config.channel
        if wanted is None or not supervisions:
            return supervisions
        named = [[sup.channel] if isinstance(sup.channel, int) else list(sup.channel) for sup in supervisions]
        kept = [
            replace(sup, channel=wanted)
            for sup, channels in zip(supervisions, named, strict=True)
            if wanted in channels
        ]
        if not kept:
            there = ", ".join(map(str, sorted({number for channels in named for number in channels})))
            raise DataError(
                f"no utterance names channel {wanted}, they name {there}",
                where=str(path),
                remedy=f"set corpus.channel to one of these; if channel {wanted} is what was transcribed, "
                "correct the manifest",
            )
        if len(kept) < len(supervisions):
            gone = len(supervisions) - len(kept)
            notes.append(f"{gone} of {len(supervisions)} {split} utterances are not of channel {wanted}")
        return kept

    def _located(self, recording: Any, corpus_dir: Path) -> Any:
        """The recording with absolute paths, and resampled if asked for."""
        sources = [
            replace(source, source=str(corpus_dir / source.source)) if source.type == "file" else source
            for source in recording.sources
        ]
        recording = replace(recording, sources=sources)
        if self.config.resample and recording.sampling_rate != SAMPLE_RATE:
            recording = recording.resample(SAMPLE_RATE)
        return recording


def _read(path: Path, parse: Callable[[dict[str, Any]], Any], problems: list[Any]) -> list[Any]:
    """Entries of a manifest file; what can't be read goes to ``problems``, with its line."""
    lines, found = read_lines(path)
    problems += found
    entries = []
    for number, line in lines:
        what: str | None
        try:
            entry = parse(json.loads(line))
            what = wrong_field(entry)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"[:120]
        if what is None:
            entries.append(entry)
        else:
            problems.append(DataProblem(what, f"{path}:{number}", kind="malformed"))
    return entries


@hookimpl
def register_corpora(register: Callable[[str, type], None]) -> None:
    """Register corpus ``manifests``."""
    register("manifests", Manifests)
