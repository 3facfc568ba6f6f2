"""Word error rate as published for Whisper: both sides by its own English normaliser first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import jiwer

from kdrecipe import hookimpl
from kdrecipe.errors import MissingExtra, Problem
from kdrecipe.interfaces import Options
from kdrecipe.text import clean

from .wer import edits

INSTALL = "pip install 'kdrecipe[whisperwer]'"


class WhisperWerOptions(Options):
    """None: the normaliser is what makes figures comparable, so nothing of it can be set."""


class WhisperWer:
    """:class:`Wer` after Whisper's English normaliser (Radford et al. 2022, arXiv 2212.04356, appendix C).

    ``colour`` and ``color``, ``twenty one`` and ``21``, ``Mr.`` and ``mister``, ``it's`` and ``it is`` are
    the same to it, and ``uh``, ``um`` and whatever is in brackets is left out. So it counts fewer errors than
    a reader of the transcript would, and rates under it compare with each other only.
    """

    Config = WhisperWerOptions

    def __init__(self, config: WhisperWerOptions) -> None:
        self.config = config
        self._normalise = _normaliser()

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, words of the reference) of one utterance."""
        found = self.details(reference, hypothesis)
        return found["sub"] + found["ins"] + found["del"], found["length"]

    def details(self, reference: str, hypothesis: str) -> dict[str, int]:
        """Substitutions, insertions and deletions (``sub``, ``ins``, ``del``) and the ``length``."""
        ref, hyp = (clean(self._normalise(clean(text))) for text in (reference, hypothesis))
        return edits(jiwer.process_words(ref, hyp))


@lru_cache
def _normaliser() -> Callable[[str], str]:
    """Made once: it reads a table of 1,700 spellings.

    Raises:
        MissingExtra: the package is not installed.
    """
    if find_spec("whisper_normalizer") is None:
        raise _missing("the metric 'wer_whisper'")
    from whisper_normalizer.english import EnglishTextNormalizer

    normaliser: Callable[[str], str] = EnglishTextNormalizer()
    return normaliser


def _missing(who: str) -> MissingExtra:
    return MissingExtra("whisper-normalizer", who, INSTALL)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """The package is missed before any work, not after all of it."""
    for i, metric in enumerate(recipe.decode.metrics):
        if metric.name == "wer_whisper" and find_spec("whisper_normalizer") is None:
            where = recipe.document.where(("decode", "metrics", i))
            return _missing(f"{where}: the metric 'wer_whisper'").problems
    return []


@hookimpl
def register_metrics(register: Callable[[str, type], None]) -> None:
    register("wer_whisper", WhisperWer)
