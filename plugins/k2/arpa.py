"""A word n-gram as an acceptor: from an ARPA file to arcs, for k2.

A state is a history, its arcs are the words known to follow it, and an arc with the label ``#0``
leads to the next shorter history at the price of the backoff weight. A search for the best path may
take that arc although the word is known to follow, and so find a sentence somewhat more probable
than the n-gram does: the usual approximation, since exact automata are larger (Allauzen 2003).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kdrecipe.data.ngram import BOS, EOS, UNK
from kdrecipe.errors import DataError

Words = tuple[str, ...]


class Ngram(NamedTuple):
    """Natural logs of a probability and of the backoff weight of the words as a history."""

    log_prob: float
    backoff: float


class Arc(NamedTuple):
    """From state ``source`` to ``target``; ``label`` -1 leads to the final state, and only that."""

    source: int
    target: int
    label: int
    score: float = 0.0
    word: int = 0


def read_arpa(path: Path) -> dict[Words, Ngram]:
    """All n-grams of an ARPA file.

    Raises:
        DataError: there is no such file, or it is not ARPA, with its line.
    """
    found: dict[Words, Ngram] = {}
    order = 0
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                if line.startswith("\\"):
                    order = _order(line)
                elif line and order:
                    words, ngram = _ngram(line, order, f"{path}:{number}")
                    found[words] = ngram
    except FileNotFoundError:
        raise DataError("no such n-gram", where=str(path), remedy="rerun the recipe's stage 2") from None
    except UnicodeDecodeError:
        found = {}
    if (EOS,) not in found:
        raise DataError("not an n-gram in ARPA format, or one without </s>", where=str(path))
    return found


def _order(heading: str) -> int:
    """2 of ``\\2-grams:``, 0 of other headings."""
    number, _, rest = heading[1:].partition("-")
    return int(number) if rest == "grams:" and number.isdecimal() else 0


def _ngram(line: str, order: int, where: str) -> tuple[Words, Ngram]:
    fields = line.split()
    try:
        log10_prob, *words = fields[: order + 1]
        log10_backoff = fields[order + 1] if len(fields) > order + 1 else "0"
        if len(words) != order or len(fields) > order + 2:
            raise ValueError
        ngram = Ngram(float(log10_prob) * math.log(10), float(log10_backoff) * math.log(10))
    except ValueError:
        raise DataError(f"not a line of {order}-grams: {line!r}", where=where) from None
    return tuple(words), ngram


def vocabulary(ngrams: Mapping[Words, Ngram]) -> list[str]:
    """The words that it knows, as the file writes them, without the marks of sentences and the unknown."""
    return sorted(words[0] for words in ngrams if len(words) == 1 and words[0] not in (BOS, EOS, UNK))


def unescape(word: str) -> str:
    """The word without the backslashes of :func:`kdrecipe.data.ngram.escape`."""
    return re.sub(r"\\(.)", r"\1", word)


def grammar_arcs(
    ngrams: Mapping[Words, Ngram], word_ids: Mapping[str, int], backoff_id: int, weight: float
) -> list[Arc]:
    """The acceptor of sentences, each with ``weight`` times its log-probability. State 0 is the start.

    Args:
        ngrams: as :func:`read_arpa` gives them.
        word_ids: ids of the words that may occur, from 1 on; n-grams with others are left out.
        backoff_id: the label ``#0``.
        weight: factor on all scores.
    """
    known = {*word_ids, BOS, EOS}
    kept = {words: ngram for words, ngram in ngrams.items() if known.issuperset(words)}
    states = _states(kept)
    final = len(states)

    def state_of(history: Words) -> int:
        while history not in states:
            history = history[1:]
        return states[history]

    def arcs() -> Iterator[Arc]:
        for words, ngram in kept.items():
            word = words[-1]
            source = states[words[:-1]]
            if word == EOS:
                yield Arc(source, final, -1, weight * ngram.log_prob)
            elif word != BOS:
                yield Arc(source, state_of(words), word_ids[word], weight * ngram.log_prob)
        for history, state in states.items():
            if history:
                backoff = kept[history].backoff if history in kept else 0.0
                yield Arc(state, state_of(history[1:]), backoff_id, weight * backoff)

    return list(arcs())


def _states(kept: Mapping[Words, Ngram]) -> dict[Words, int]:
    """Histories that need a state, the start's first: those that something follows, or that cost to leave."""
    histories = dict.fromkeys(words[:-1] for words in kept)
    priced = (w for w, ngram in kept.items() if ngram.backoff != 0.0 and w[-1] != EOS)
    histories |= dict.fromkeys(priced)
    start: Words = (BOS,) if (BOS,) in histories else ()
    return {history: state for state, history in enumerate(dict.fromkeys([start, *histories, ()]))}
