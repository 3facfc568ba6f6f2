"""Word error rate."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import jiwer

from kdrecipe import hookimpl
from kdrecipe.interfaces import Options


class TextOptions(Options):
    """How texts are normalised before they are compared.

    Args:
        lowercase: take upper and lower case for the same.
        remove_punctuation: drop punctuation marks; apostrophes within words stay.
    """

    lowercase: bool = False
    remove_punctuation: bool = False


def normalise(text: str, options: TextOptions) -> str:
    """Text as it is compared: one space between words, one spelling per letter (Unicode NFC)."""
    text = unicodedata.normalize("NFC", text)
    if options.lowercase:
        text = text.lower()
    if options.remove_punctuation:
        text = text.replace("’", "'")
        text = "".join(c if c == "'" or not unicodedata.category(c).startswith("P") else " " for c in text)
        text = " ".join(word.strip("'") for word in text.split())
    return " ".join(text.split())


class Wer:
    """Substituted, inserted and deleted words over words of the reference.

    The score is a fraction and may exceed 1. An empty reference has length 0; every word
    recognised there is an insertion.
    """

    Config = TextOptions

    def __init__(self, config: TextOptions) -> None:
        self.config = config

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, words of the reference) of one utterance."""
        edits = self.details(reference, hypothesis)
        return edits["sub"] + edits["ins"] + edits["del"], edits["length"]

    def details(self, reference: str, hypothesis: str) -> dict[str, int]:
        """Substitutions, insertions and deletions (``sub``, ``ins``, ``del``) and the ``length``."""
        return count_edits(jiwer.process_words, reference, hypothesis, self.config)


def count_edits(
    process: Callable[[str, str], jiwer.WordOutput | jiwer.CharacterOutput],
    reference: str,
    hypothesis: str,
    options: TextOptions,
) -> dict[str, int]:
    """Align two texts by words or characters; counts named as in :meth:`Wer.details`."""
    found = process(normalise(reference, options), normalise(hypothesis, options))
    return {
        "sub": found.substitutions,
        "ins": found.insertions,
        "del": found.deletions,
        "length": found.hits + found.substitutions + found.deletions,
    }


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("wer", Wer)
