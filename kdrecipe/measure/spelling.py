"""What a runtime writes, against what its tokens spell.

A near tie makes a runtime hear other tokens, for better or worse. This is about the same tokens with another
text: a rule of the runtime, which damages every utterance that it is about, in the same way.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdrecipe.errors import Problem
from kdrecipe.interfaces import Exporter, Hypothesis, Speller, TokenTable
from kdrecipe.measure.edits import edits
from kdrecipe.text import WORD_START, clean

REMEDY = (
    "take an exporter that keeps the texts, or leave this one out of export, or change the corpus's texts; "
    "or accept it: set parity.max_rewritten to {share:g}, and rows count what the runtime writes"
)


def speller_of(exporter: Exporter | type[Exporter], pieces: Sequence[str]) -> Speller | None:
    """What an exporter (or its class) knows of its runtime's texts, of tokens with these pieces."""
    make: Callable[[Sequence[str]], Speller] | None = getattr(exporter, "speller", None)
    return None if make is None else make(pieces)


@dataclass
class Spelling:
    """Texts of one runtime, counted.

    Args:
        tokens: of the model; they spell.
        speller: what the runtime is known to make of token ids; None: nothing is known.
        runtime: its name.
        num_words: that tokens spelled.
        num_changed: of them, those that were written otherwise (also words added).
        num_utterances: how many were looked at.
        rewritten: tokens and written text of each utterance whose tokens spell another one.
        left_out: pieces that the runtime said nothing for, with how often.
    """

    tokens: TokenTable
    speller: Speller | None
    runtime: str
    num_words: int = 0
    num_changed: int = 0
    num_utterances: int = 0
    rewritten: list[tuple[list[int], str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Share of words that are written otherwise."""
        return min(1.0, self.num_changed / max(1, self.num_words))

    def add(self, tokens: Sequence[int], text: str) -> None:
        """Count one utterance: its tokens, and the text that the runtime wrote."""
        spelled, written = self.tokens.decode(tokens), clean(text)
        words = spelled.split()
        self.num_utterances += 1
        self.num_words += len(words)
        if spelled != written:
            self.num_changed += max(1, edits(words, written.split()).errors)
            self.rewritten.append((list(tokens), written))

    def foresee(self, text: str) -> None:
        """Count what the runtime will write if the model says ``text``, by what is known of it."""
        assert self.speller is not None
        ids = self.tokens.encode(text)
        self.add(ids, self.speller(ids))
        silent = (i for i in ids if not self.speller([i]) and self.tokens.decode([i]))
        self.left_out.update(self.tokens.pieces[i] for i in silent)

    def heard(self, said: Hypothesis, likely: Sequence[int]) -> list[int]:
        """The tokens behind what a runtime said.

        These are ``likely`` (of the same model on other features, or of the bundle) if the runtime is known
        to write exactly its text for them, and that is not what they spell; otherwise those that it names.
        """
        tokens, written = list(said.tokens), clean(said.text)
        if self.speller is None or tokens == list(likely):
            return tokens
        if clean(self.speller(likely)) != written or self.tokens.decode(likely) == written:
            return tokens
        missing = Counter(likely) - Counter(tokens)
        self.left_out.update({self.tokens.pieces[i]: number for i, number in missing.items()})
        return list(likely)

    def problem(self, where: str, limit: float) -> Problem:
        """That this is more than ``limit``, a share of words."""
        what = (
            f"{self.summary()}: {self.rate:.2%} of words, at most {limit:.2%} allowed (parity.max_rewritten)"
        )
        return Problem(what, where, REMEDY.format(share=min(1, math.ceil(200 * self.rate) / 100)))

    def summary(self) -> str:
        """What was rewritten, with an example; of at least one utterance."""
        number, total = len(self.rewritten), self.num_utterances
        texts = f"{number} of {total} {'text' if total == 1 else 'texts'}"
        return f"{self.runtime} writes {texts} otherwise than the tokens spell ({self._cause()})"

    def _cause(self) -> str:
        """An example in the first words that differ, with what the runtime leaves out."""
        ids, written = self.rewritten[0]
        spelled, found = self.tokens.decode(ids).split(), written.split()
        matcher = difflib.SequenceMatcher(None, spelled, found, autojunk=False)
        first = next(code for code in matcher.get_opcodes() if code[0] != "equal")
        _, start, end, other, other_end = first
        before, after = " ".join(spelled[start:end]), " ".join(found[other:other_end])
        example = f"{before!r} (tokens {' '.join(self._pieces(ids, start, end))}) becomes {after!r}"
        return f"{example}; it leaves out {', '.join(self.left_out)}" if self.left_out else example

    def _pieces(self, ids: Sequence[int], start: int, end: int) -> list[str]:
        """Of the words from ``start`` to before ``end``."""
        pieces = [self.tokens.pieces[i] for i in ids]
        word_P = np.cumsum([p.startswith(WORD_START) or i == 0 for i, p in enumerate(pieces)]) - 1
        return [piece for piece, word in zip(pieces, word_P, strict=True) if start <= word < end]
