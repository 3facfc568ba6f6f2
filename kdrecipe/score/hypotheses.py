"""Hypotheses files: a JSON object per line for each utterance, with ``id``, ``ref``, ``hyp`` and more.

``tokens`` are ids of the bundle's tokens or, if a runtime recognised them, their texts.
"""

from __future__ import annotations

import json
from pathlib import Path

from kdrecipe.errors import DataError, Problem
from kdrecipe.text import clean, read_lines


def read_hypotheses(path: Path) -> dict[str, tuple[str, str]]:
    """Utterance id -> (reference, hypothesis), both by :func:`kdrecipe.text.clean`.

    Raises:
        DataError: a line is no JSON object with ``id``, ``ref`` and ``hyp``, an id occurs
            twice, or the file is missing or empty.
    """
    found: dict[str, tuple[str, str]] = {}
    problems = []
    try:
        lines = read_lines(path)
    except OSError:
        raise DataError("hypotheses are missing", where=str(path), remedy="run the decode stage") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            utterance, texts = str(row["id"]), (clean(str(row["ref"])), clean(str(row["hyp"])))
        except (ValueError, KeyError, TypeError):
            problems.append(
                Problem("not a JSON object with id, ref and hyp", where, "rerun the decode stage")
            )
            continue
        if utterance in found:
            problems.append(Problem(f"utterance {utterance!r} occurs twice", where, "rerun the decode stage"))
        found[utterance] = texts
    if problems:
        raise DataError(problems)
    if not found:
        raise DataError("no hypotheses in here", where=str(path), remedy="rerun the decode stage")
    return found


def hyps_file(directory: Path, split: str) -> Path:
    """The hypotheses by which a system's row of the table is scored."""
    return directory / f"{split}.jsonl"


def bundle_hyps_file(directory: Path, label: str, split: str) -> Path:
    """The hypotheses of the bundle in torch, by the search ``label``."""
    return directory / "bundle" / label / f"{split}.jsonl"


def condition_hyps_file(directory: Path, condition: str) -> Path:
    """The hypotheses of a system's row for utterances under a condition."""
    return directory / "robustness" / f"{condition}.jsonl"
