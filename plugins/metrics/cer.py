"""Character error rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jiwer

from kdrecipe import hookimpl

from .wer import TextOptions, count_edits, text_notes


class Cer:
    """Substituted, inserted and deleted characters over characters of the reference.

    The single space between words counts as a character, so that joined and split words are
    errors. The score is a fraction and may exceed 1.
    """

    Config = TextOptions

    def __init__(self, config: TextOptions) -> None:
        self.config = config

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, characters of the reference) of one utterance."""
        edits = self.details(reference, hypothesis)
        return edits["sub"] + edits["ins"] + edits["del"], edits["length"]

    def details(self, reference: str, hypothesis: str) -> dict[str, int]:
        """Substitutions, insertions and deletions (``sub``, ``ins``, ``del``) and the ``length``."""
        return count_edits(jiwer.process_characters, reference, hypothesis, self.config)

    def notes(self, references: Sequence[str], hypotheses: Sequence[str]) -> list[str]:
        """What the report must state of this metric on these texts."""
        return text_notes(references, hypotheses, self.config)


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("cer", Cer)
