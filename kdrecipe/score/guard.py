"""Whether a teacher has learnt: its errors on dev beside those of a quick baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jiwer

from kdrecipe.interfaces import Options
from kdrecipe.score.intervals import LEVEL
from kdrecipe.score.scoring import Question, score_split

MARGIN = 0.1
LEARNT = 0.02
PLATEAU = 0.8

Texts = Mapping[str, tuple[str, str]]


class CharacterErrors:
    """Wrong characters: a unit in which models with other tokens can be compared, too."""

    Config: ClassVar[type[Options]] = Options

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, characters of the reference) of one utterance."""
        found = jiwer.process_characters(reference, hypothesis)
        wrong = found.substitutions + found.insertions + found.deletions
        return wrong, found.hits + found.substitutions + found.deletions


def error_rates(texts: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Shares of wrong words and characters, of (reference, hypothesis); references must have some."""
    references, hypotheses = ([text[i] for text in texts] for i in (0, 1))
    return float(jiwer.wer(references, hypotheses)), float(jiwer.cer(references, hypotheses))


def compare(teacher: Texts, baseline: Texts, speakers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Judge a teacher.

    It has learnt if its character errors are at least a tenth (``MARGIN``) below those of the baseline,
    and beyond chance, in a test that is paired over utterances and allows for speakers as those of the
    report do. The baseline has a small model and had a fraction of the teacher's training: a teacher that is
    not even so much better has hardly anything to teach.

    Two rates decide by themselves. With 4 of 5 characters wrong (``PLATEAU``) a teacher is still where CTC
    begins, on the plateau of blanks, even if the baseline knows less. A teacher with 49 of 50 right
    (``LEARNT``) has learnt, even if the task is so easy that the baseline has, too.

    Args:
        teacher: utterance id -> (reference, what the teacher recognised), of dev.
        baseline: the same utterances.
        speakers: utterance id -> speaker, where it is known.

    Returns:
        ``learnt``, ``cer`` and ``baseline_cer`` (fractions, may exceed 1), ``ci95`` of their difference,
        ``p``, ``utterances``, ``units`` (``speakers`` or ``utterances``).

    Raises:
        DataError: the utterances or references differ, or no reference has a character.
    """
    texts = {"teacher": {0: teacher}, "baseline": {0: baseline}}
    question = Question(compare=[("teacher", "baseline")])
    scored = score_split(texts, {"cer": CharacterErrors()}, question, split="dev", speakers=speakers)
    [found] = scored["comparisons"]
    mine, other, p = found["a_mean"], found["b_mean"], found["p"]
    better = mine <= (1 - MARGIN) * other and p < 1 - LEVEL
    return {
        "learnt": mine <= LEARNT or (mine < PLATEAU and better),
        "cer": mine,
        "baseline_cer": other,
        "ci95": found["ci95"],
        "p": p,
        "utterances": scored["utterances"],
        "units": scored["units"],
    }
