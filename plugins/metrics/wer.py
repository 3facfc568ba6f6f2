"""Word error rate."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import jiwer

from kdrecipe import hookimpl
from kdrecipe.interfaces import Options
from kdrecipe.text import clean, lower


class TextOptions(Options):
    """How texts are normalised before they are compared.

    Args:
        lowercase: take upper and lower case for the same.
        remove_punctuation: drop punctuation marks; apostrophes within words stay.
        language: whose letters ``lowercase`` goes by: in Turkish and Azerbaijani (``tr``, ``az``) I is the
            capital of ı, in Lithuanian (``lt``) i keeps its dot under an accent; None: all other languages.
    """

    lowercase: bool = False
    remove_punctuation: bool = False
    language: Literal["tr", "az", "lt"] | None = None


def normalise(text: str, options: TextOptions) -> str:
    """Text as it is compared: by :func:`kdrecipe.text.clean`, then by the options."""
    text = clean(text)
    if options.lowercase:
        text = lower(text, options.language)
    if options.remove_punctuation:
        text = text.replace("’", "'")
        text = "".join(c if c == "'" or not unicodedata.category(c).startswith("P") else " " for c in text)
        text = " ".join(word.strip("'") for word in text.split())
    return clean(text)


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
        found = self.details(reference, hypothesis)
        return found["sub"] + found["ins"] + found["del"], found["length"]

    def details(self, reference: str, hypothesis: str) -> dict[str, int]:
        """Substitutions, insertions and deletions (``sub``, ``ins``, ``del``) and the ``length``."""
        return count_edits(jiwer.process_words, reference, hypothesis, self.config)

    def notes(self, references: Sequence[str], hypotheses: Sequence[str]) -> list[str]:
        """What the report must state of this metric on these texts."""
        return text_notes(references, hypotheses, self.config)


def text_notes(references: Sequence[str], hypotheses: Sequence[str], options: TextOptions) -> list[str]:
    """That Turkish letters are lowered as if they were of another language."""
    if not options.lowercase or options.language is not None:
        return []
    dotless = sum("ı" in text or "İ" in text for text in (*references, *hypotheses))
    if not dotless:
        return []
    return [
        f"{dotless} texts have ı or İ, and lowercase makes i of I, so that IŞIK and ışık differ: "
        "for Turkish or Azerbaijani set language: tr or az beside lowercase"
    ]


def count_edits(
    process: Callable[[str, str], jiwer.WordOutput | jiwer.CharacterOutput],
    reference: str,
    hypothesis: str,
    options: TextOptions,
) -> dict[str, int]:
    """Align two texts by words or characters; counts named as in :meth:`Wer.details`."""
    return edits(process(normalise(reference, options), normalise(hypothesis, options)))


def edits(found: jiwer.WordOutput | jiwer.CharacterOutput) -> dict[str, int]:
    """An alignment's counts, named as in :meth:`Wer.details`."""
    return {
        "sub": found.substitutions,
        "ins": found.insertions,
        "del": found.deletions,
        "length": found.hits + found.substitutions + found.deletions,
    }


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("wer", Wer)
