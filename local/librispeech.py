"""LibriSpeech and mini_librispeech: read English, 16 kHz, through Lhotse's own preparation.

Any subset of the parts will do: ``train-clean-5`` and ``dev-clean-2`` of mini_librispeech, or one
or more of LibriSpeech's seven. Word alignments are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from kdrecipe import hookimpl
from kdrecipe.corpus.gather import Utterance, gather, read_lines
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import Options, Prepared

_SPLITS = ("train", "dev", "test")


class LibriSpeech:
    """Corpus ``librispeech``."""

    default_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("train-clean-100", "train-clean-360", "train-other-500"),
        "dev": ("dev-clean", "dev-other"),
        "test": ("test-clean", "test-other"),
    }

    class Config(Options):
        """Options of the corpus.

        Args:
            parts: split (``train``, ``dev``, ``test``, or any further name such as
                ``test_other``) -> the parts that make it up; null: there is no such split.
                Empty: those of the corpus's usual parts that are there. A part named for several
                splits is divided between them by speakers.
            num_workers: threads that read the audio files' headers.
        """

        parts: dict[str, list[str] | None] = {}
        num_workers: int = 1

    def __init__(self, config: Config) -> None:
        self.config = config
        named = tuple(split for split, parts in config.parts.items() if parts is not None)
        self.split_names = named if config.parts else _SPLITS

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Manifests of the splits.

        Raises:
            DataError: if a part is absent, or a part that must be divided has too few speakers.
        """
        root = _find_root(corpus_dir)
        notes: list[str] = []
        split_parts = self._choose_parts(root, notes)
        problems: list[DataProblem] = []
        manifests = {
            part: self._prepare_part(root, part, problems)
            for part in dict.fromkeys(part for parts in split_parts.values() for part in parts)
        }
        splits = _assign(split_parts, manifests, notes)
        return Prepared(splits, list(problems), notes)

    def _choose_parts(self, root: Path, notes: list[str]) -> dict[str, list[str]]:
        """Which parts make up each split: as configured, else whatever usual ones there are."""
        if self.config.parts:
            chosen = {split: list(parts) for split, parts in self.config.parts.items() if parts is not None}
            absent = sorted({p for parts in chosen.values() for p in parts if not (root / p).is_dir()})
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
            if absent:
                remedy = f"download it, or choose among those that are there: {there}"
                raise DataError(Problem(f"no part {part!r}", str(root), remedy) for part in absent)
            return chosen
        chosen = {
            split: [part for part in parts if (root / part).is_dir()]
            for split, parts in self.default_parts.items()
        }
        if not chosen["dev"] or not chosen["test"]:  # one serves for both, divided by speakers
            chosen["dev"] = chosen["test"] = chosen["dev"] or chosen["test"]
        for split in ("train", "dev"):
            if not chosen[split]:
                usual = ", ".join(self.default_parts[split])
                raise DataError(
                    f"no part for {split}: none of {usual}",
                    where=str(root),
                    remedy="download one, or say which parts make up each split with corpus.parts",
                )
        notes += [f"{split}: {', '.join(chosen[split])}" for split in _SPLITS]
        return chosen

    def _prepare_part(
        self, root: Path, part: str, problems: list[DataProblem]
    ) -> tuple[list[Any], list[Any]]:
        """Recordings and supervisions of a part, sorted by id.

        Lhotse's preparation stops at a broken file and only logs a missing one, so a part where
        something is wrong is gathered utterance by utterance instead.
        """
        utterances, found = _scan(root / part)
        recordings, supervisions, more = gather(utterances)
        found += more
        problems += found
        if utterances and not found:
            from lhotse.recipes import prepare_librispeech

            made: Any = prepare_librispeech(root, dataset_parts=[part], num_jobs=self.config.num_workers)
            recordings, supervisions = made[part]["recordings"], made[part]["supervisions"]
        return sorted(recordings, key=lambda r: r.id), sorted(supervisions, key=lambda s: s.id)


class MiniLibriSpeech(LibriSpeech):
    """Corpus ``mini_librispeech``: dev and test are halves of ``dev-clean-2``, by speakers."""

    default_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("train-clean-5",),
        "dev": ("dev-clean-2",),
        "test": (),
    }


def _find_root(corpus_dir: Path | None) -> Path:
    """The folder that holds the parts: ``corpus_dir``, or ``LibriSpeech`` in it as the archives unpack."""
    if corpus_dir is not None:
        inner = corpus_dir / "LibriSpeech"
        if inner.is_dir():
            return inner.absolute()
        if corpus_dir.is_dir():
            return corpus_dir.absolute()
    raise DataError(
        "no such folder",
        where=str(corpus_dir or "corpus.root"),
        remedy="download it from https://www.openslr.org/12 (31 for mini_librispeech); set corpus.root",
    )


def _scan(part_dir: Path) -> tuple[list[Utterance], list[DataProblem]]:
    """Utterances that the ``*.trans.txt`` files name, and what is wrong with these files."""
    utterances: list[Utterance] = []
    problems: list[DataProblem] = []
    garbled: set[Path] = set()  # there, a missing transcript is most likely a line that can't be read
    for text_file in sorted(part_dir.rglob("*.trans.txt")):
        lines, found = read_lines(text_file)
        problems += found
        if found:
            garbled.add(text_file.parent)
        for number, line in lines:
            utterance_id, _, text = line.partition(" ")
            audio = text_file.parent / f"{utterance_id}.flac"
            if not text.strip():
                where = f"{text_file}:{number}"
                problems.append(DataProblem(utterance_id, where, kind="empty_text", id=utterance_id))
            speaker = utterance_id.partition("-")[0]
            utterances.append(Utterance(utterance_id, audio, text.strip(), speaker))
    named = {utt.audio for utt in utterances}
    for audio in sorted(part_dir.rglob("*.flac")):
        if audio not in named and audio.parent not in garbled:
            problems.append(DataProblem("", str(audio), kind="missing_text"))
    return utterances, problems


def _assign(
    split_parts: dict[str, list[str]], manifests: dict[str, tuple[list[Any], list[Any]]], notes: list[str]
) -> dict[str, Any]:
    """Join parts into splits; a part that several splits name is divided by speakers."""
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet

    chosen: dict[str, tuple[list[Any], list[Any]]] = {split: ([], []) for split in split_parts}
    for part, (recordings, supervisions) in manifests.items():
        sharing = [split for split, parts in split_parts.items() if part in parts]
        speakers_of = _divide(part, sharing, supervisions, notes)
        for split, speakers in zip(sharing, speakers_of, strict=True):
            sups = [sup for sup in supervisions if sup.speaker in speakers]
            wanted = {sup.recording_id for sup in sups}
            chosen[split][0].extend(r for r in recordings if r.id in wanted)
            chosen[split][1].extend(sups)
    return {
        split: (RecordingSet.from_recordings(recs), SupervisionSet.from_segments(sups))
        for split, (recs, sups) in chosen.items()
    }


def _divide(part: str, sharing: list[str], supervisions: Iterable[Any], notes: list[str]) -> list[set[str]]:
    """The speakers of a part, dealt in turn to the splits that share it."""
    speakers = sorted({sup.speaker for sup in supervisions})
    if len(sharing) > len(speakers) and len(sharing) > 1:
        raise DataError(
            f"{len(speakers)} speakers can't be divided between {' and '.join(sharing)}",
            where=part,
            remedy="give each split its own parts with corpus.parts",
        )
    dealt = [set(speakers[i :: len(sharing)]) for i in range(len(sharing))]
    if len(sharing) > 1:
        shares = "; ".join(
            f"{split} has {len(names)} of them" for split, names in zip(sharing, dealt, strict=True)
        )
        notes.append(f"{part} is divided by speakers: {shares}")
    return dealt


@hookimpl
def register_corpora(register: Callable[[str, type], None]) -> None:
    """Register corpora ``librispeech`` and ``mini_librispeech``."""
    register("librispeech", LibriSpeech)
    register("mini_librispeech", MiniLibriSpeech)
