"""What can be wrong with a corpus, kind by kind, and what becomes of it.

All problems are reported at once, by kind, with counts and file names. ``on_error: stop`` ends
there, ``on_error: skip`` leaves those utterances out and lists each: nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdrecipe.errors import DataError, Problem

NAMES_SHOWN = 10  # files named per kind of problem on the terminal; problems.txt names all

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class _Kind:
    singular: str
    plural: str
    remedy: str


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
}
"""Every kind of problem that a corpus can have, in the order in which they are reported."""

_KEEPS_FIRST = "duplicate_id"  # the only kind where the id itself stays, once


@dataclass(frozen=True)
class DataProblem(Problem):
    """What is wrong with one file, line or utterance.

    Args:
        what: detail, shown in brackets after ``where`` (may be empty: the kind says enough).
        where: the file, or ``file:line``.
        kind: a key of :data:`KINDS`.
        id: the supervision to leave out on ``skip``; empty if it never became one.
    """

    kind: str = "malformed"
    id: str = ""


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
    problems = _distinct(problems)
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


def _by_kind(problems: Sequence[Problem], list_file: Path | None) -> list[Problem]:
    """One problem per kind, with its count and names; those without a kind as they are."""
    grouped: dict[str, list[str]] = {kind: [] for kind in KINDS}
    others = []
    for problem in problems:
        if isinstance(problem, DataProblem):
            name = f"{problem.where} ({problem.what})" if problem.what else problem.where
            if name not in grouped[problem.kind]:  # two transcripts of one file that is broken
                grouped[problem.kind].append(name)
        else:
            others.append(problem)
    if list_file is not None and any(len(names) > NAMES_SHOWN for names in grouped.values()):
        list_file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{KINDS[kind].singular}\t{name}\n" for kind, names in grouped.items() for name in names]
        list_file.write_text("".join(lines), encoding="utf-8")
    result = []
    for kind, names in grouped.items():
        if names:
            shown = ", ".join(names[:NAMES_SHOWN])
            if len(names) > NAMES_SHOWN:
                shown += f" and {len(names) - NAMES_SHOWN} more"
                shown += f" (all of them: {list_file})" if list_file is not None else ""
            noun = KINDS[kind].singular if len(names) == 1 else KINDS[kind].plural
            result.append(Problem(f"{len(names)} {noun}: {shown}", remedy=KINDS[kind].remedy))
    skippable = any(grouped[kind] for kind in KINDS if kind != "empty_split")
    if skippable and not others:
        last = result[-1]
        skip = "or leave all such utterances out, listed in the report: corpus.on_error: skip"
        result[-1] = Problem(last.what, last.where, f"{last.remedy};\n       {skip}")
    return result + others


def as_left_out(problems: Sequence[Problem]) -> list[dict[str, str]]:
    """Problems as entries of ``left_out`` in a summary: what the report prints after ``skip``."""
    entries = []
    for problem in _distinct(problems):
        if isinstance(problem, DataProblem):
            reason = KINDS[problem.kind].singular + (f": {problem.what}" if problem.what else "")
            entries.append({"id": problem.id or problem.where, "where": problem.where, "reason": reason})
    return entries
