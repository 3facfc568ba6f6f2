"""What can be wrong with a corpus, kind by kind, and what becomes of it.

All problems are reported at once, by kind, with counts and file names. ``on_error: stop`` ends
there, ``on_error: skip`` leaves those utterances out and lists each: nothing is left out silently.

Some kinds are notes: they may be meant, so they stop nothing, and the report states them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdrecipe.errors import DataError, Problem

NAMES_SHOWN = 10  # files named per kind of problem on the terminal; problems.txt names all
NAMES_NOTED = 5  # utterances named per kind of note

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class _Kind:
    singular: str
    plural: str
    remedy: str = ""
    is_note: bool = False


KINDS = {
    "missing_audio": _Kind(
        "transcript without audio", "transcripts without audio", "fetch the audio, or remove the lines"
    ),
    "missing_text": _Kind(
        "audio file without a transcript", "audio files without a transcript", "add the transcripts"
    ),
    "undecodable": _Kind(
        "audio file that can't be decoded", "audio files that can't be decoded", "fetch them again"
    ),
    "zero_length": _Kind(
        "audio file of zero length", "audio files of zero length", "fetch them again, or remove them"
    ),
    "wrong_length": _Kind(
        "audio file that is not as long as its manifest says",
        "audio files that are not as long as their manifests say",
        "correct duration and num_samples, e.g. with lhotse.Recording.from_file: Lhotse fills what is "
        "missing with mirrored sound and cuts off what is too much",
    ),
    "non_finite": _Kind(
        "audio file with samples that are no numbers (NaN or infinite)",
        "audio files with samples that are no numbers (NaN or infinite)",
        "make them again: one such sample spoils the mean of all features",
    ),
    "silent": _Kind(
        "utterance in which nothing sounds",
        "utterances in which nothing sounds",
        "check file, channel, start and duration: there is a text for it",
    ),
    "no_channel": _Kind(
        "utterance with a channel that is not there",
        "utterances with a channel that is not there",
        "correct the channels in the manifests",
    ),
    "several_channels": _Kind(
        "utterance with several channels",
        "utterances with several channels",
        "models hear one: choose it with corpus.channel (corpus 'manifests') or gather(channel=) (a plugin), "
        "or make an utterance of each channel",
    ),
    "sampling_rate": _Kind(
        "audio file with a wrong sampling rate",
        "audio files with a wrong sampling rate",
        "convert them; corpus 'manifests' can do it while reading (resample: true)",
    ),
    "duplicate_id": _Kind(
        "id that occurs more than once", "ids that occur more than once", "give each its own name"
    ),
    "empty_text": _Kind("empty transcript", "empty transcripts", "transcribe them, or remove them"),
    "not_utf8": _Kind(
        "text that is not UTF-8",
        "texts that are not UTF-8",
        "convert the file: iconv -f latin1 -t utf-8 (or whatever its encoding is)",
    ),
    "control_characters": _Kind(
        "transcript with control characters",
        "transcripts with control characters",
        "remove them from the texts",
    ),
    "malformed": _Kind("line that can't be read", "lines that can't be read", "fix the file"),
    "beyond_audio": _Kind(
        "transcript outside its audio", "transcripts outside their audio", "correct start and duration"
    ),
    "too_short": _Kind(
        "utterance too short for its text",
        "utterances too short for their text",
        "CTC and the searches of transducers say a token per frame at most: check the transcripts, "
        "or take larger tokens",
    ),
    "empty_split": _Kind("split without utterances", "splits without utterances", "check corpus.root"),
    "very_short": _Kind("utterance below 0.1 s", "utterances below 0.1 s", is_note=True),
    "very_long": _Kind("utterance above 30 s", "utterances above 30 s", is_note=True),
    "overlapping": _Kind(
        "utterance that overlaps another in the same recording and channel",
        "utterances that overlap another in the same recording and channel",
        is_note=True,
    ),
    "clipped": _Kind("clipped utterance", "clipped utterances", is_note=True),
    "over_scale": _Kind(
        "utterance with samples beyond full scale", "utterances with samples beyond full scale", is_note=True
    ),
    "quiet": _Kind(
        "very quiet utterance (peak below -40 dB of full scale)",
        "very quiet utterances (peak below -40 dB of full scale)",
        is_note=True,
    ),
    "narrow_band": _Kind(
        "recording with nothing above 4 kHz (resampled from 8 kHz?)",
        "recordings with nothing above 4 kHz (resampled from 8 kHz?)",
        is_note=True,
    ),
    "opposite_phase": _Kind(
        "recording whose channels cancel each other: their average is silence",
        "recordings whose channels cancel each other: their average is silence",
        is_note=True,
    ),
}
"""Every kind of problem and of note, in the order in which they are reported."""

_KEEPS_FIRST = "duplicate_id"  # the only kind where the id itself stays, once


@dataclass(frozen=True)
class DataProblem(Problem):
    """What is wrong with one file, line or utterance.

    Args:
        what: detail, shown in brackets after ``where`` (may be empty: the kind says enough).
        where: the file, or ``file:line``; of a note the utterance, since reports are published.
        kind: a key of :data:`KINDS`.
        id: the supervision to leave out on ``skip``; empty if it never became one.
    """

    kind: str = "malformed"
    id: str = ""

    @property
    def is_note(self) -> bool:
        """Whether it stops nothing."""
        return KINDS[self.kind].is_note


def notes_of(problems: Sequence[Problem], left_out: Collection[str] = ()) -> list[str]:
    """The notes among ``problems`` as sentences, one per kind, without utterances that are left out."""
    grouped = _grouped([p for p in problems if _is_note(p) and getattr(p, "id", "") not in left_out])
    return [_counted(kind, names, NAMES_NOTED) for kind, names in grouped.items()]


def _is_note(problem: Problem) -> bool:
    return isinstance(problem, DataProblem) and problem.is_note


def settle(problems: Sequence[Problem], on_error: OnError, list_file: Path | None = None) -> set[str]:
    """Stop, or say which utterances to leave out.

    Args:
        problems: of :func:`validate_corpus`, :func:`check_lengths`, a plugin.
        on_error: ``stop`` or ``skip``.
        list_file: where to write all names if there are more than fit on the terminal.

    Returns:
        Ids to leave out (with ``skip``).

    Raises:
        DataError: with ``stop``, if there is any problem; with ``skip``, for what leaving out
            utterances does not fix (a plugin's problem that has no kind, an empty split).
    """
    problems = [p for p in _distinct(problems) if not _is_note(p)]
    if on_error == "skip":
        stays = [p for p in problems if not isinstance(p, DataProblem) or p.kind == "empty_split"]
        if stays:
            raise DataError(_by_kind(stays, None))
        return {p.id for p in problems if isinstance(p, DataProblem) and p.kind != _KEEPS_FIRST} - {""}
    if problems:
        raise DataError(_by_kind(problems, list_file))
    return set()


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    """Without what was found twice, by a plugin and by validation: the plugin knows the line."""
    first: dict[object, Problem] = {}
    for problem in problems:
        known = isinstance(problem, DataProblem) and problem.id
        first.setdefault((problem.kind, problem.id) if known else problem, problem)  # type: ignore[attr-defined]
    return list(first.values())


def _grouped(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Kind -> names with details, in the order of :data:`KINDS`; without problems that have no kind."""
    grouped: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for problem in problems:
        if isinstance(problem, DataProblem):
            name = f"{problem.where} ({problem.what})" if problem.what else problem.where
            if name not in grouped[problem.kind]:  # two transcripts of one file that is broken
                grouped[problem.kind].append(name)
    return {kind: names for kind, names in grouped.items() if names}


def _counted(kind: str, names: Sequence[str], most: int) -> str:
    """``3 empty transcripts: a, b and 1 more``."""
    noun = KINDS[kind].singular if len(names) == 1 else KINDS[kind].plural
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {noun}: {', '.join(names[:most])}{more}"


def _by_kind(problems: Sequence[Problem], list_file: Path | None) -> list[Problem]:
    """One problem per kind, with its count and names; those without a kind as they are."""
    grouped = _grouped(problems)
    others = [problem for problem in problems if not isinstance(problem, DataProblem)]
    if list_file is not None and any(len(names) > NAMES_SHOWN for names in grouped.values()):
        list_file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{KINDS[kind].singular}\t{name}\n" for kind, names in grouped.items() for name in names]
        list_file.write_text("".join(lines), encoding="utf-8")
    result = []
    for kind, names in grouped.items():
        listed = list_file is not None and len(names) > NAMES_SHOWN
        what = _counted(kind, names, NAMES_SHOWN) + (f" (all of them: {list_file})" if listed else "")
        result.append(Problem(what, remedy=KINDS[kind].remedy))
    skippable = any(kind != "empty_split" for kind in grouped)
    if skippable and not others:
        last = result[-1]
        skip = "or leave all such utterances out, listed in the report: corpus.on_error: skip"
        result[-1] = Problem(last.what, last.where, f"{last.remedy};\n       {skip}")
    return result + others


def as_left_out(problems: Sequence[Problem]) -> list[dict[str, str]]:
    """Problems as entries of ``left_out`` in a summary: what the report prints after ``skip``."""
    entries = []
    for problem in _distinct(problems):
        if isinstance(problem, DataProblem) and not problem.is_note:
            reason = KINDS[problem.kind].singular + (f": {problem.what}" if problem.what else "")
            entries.append({"id": problem.id or problem.where, "where": problem.where, "reason": reason})
    return entries
