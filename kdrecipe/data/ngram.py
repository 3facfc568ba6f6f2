"""N-gram language models: estimated here, kept as ARPA files, read in searches by KenLM.

The estimate is interpolated modified Kneser-Ney (Chen and Goodman 1999) as KenLM's ``lmplz`` makes it
(Heafield 2013), without pruning. Text and n-grams are held in memory, as arrays: P positions of the
text, sentence marks included; G n-grams of one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.artifacts import read_json, replacing
from kdrecipe.errors import DataError, KdrecipeError, MissingExtra
from kdrecipe.interfaces import TokenTable

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
INSTALL_KENLM = "python -m pip install kenlm"

_UNK, _BOS, _EOS = 0, 1, 2  # indices in Ngram.symbols
_FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)  # lmplz's, where counts of counts give none
_LN_10 = log(10)
_NEVER = -99.0  # log10: what ARPA files write for log(0)


@dataclass(frozen=True)
class Level:
    """The n-grams of one order, sorted by context, then symbol.

    Args:
        contexts_G: int64, index of all symbols but the last among the (n-1)-grams; 0 for 1-grams.
        symbols_G: int64, the last symbol.
        log_probs_G: natural log-probability of the last symbol after the context, interpolated.
        backoffs_G: natural log of what the n-gram, as a context, leaves to those that never followed it.
    """

    contexts_G: np.ndarray
    symbols_G: np.ndarray
    log_probs_G: np.ndarray
    backoffs_G: np.ndarray


@dataclass(frozen=True)
class Ngram:
    """A smoothed n-gram model; made by :func:`estimate`.

    Args:
        symbols: ``<unk>``, ``<s>``, ``</s>`` and the vocabulary, as the ARPA file writes them.
        levels: order 1 first.
    """

    symbols: tuple[str, ...]
    levels: tuple[Level, ...]

    def log_probs(self, sentences: Iterable[Sequence[str]]) -> np.ndarray:
        """Natural log-probability of every symbol and every end of a sentence, one after the other.

        Symbols that are not in the vocabulary count as ``<unk>``.
        """
        ids_P, place_P = _flatten(sentences, {s: i for i, s in enumerate(self.symbols)})
        grams_P, log_probs_P = ids_P, self.levels[0].log_probs_G[ids_P]
        for n, (shorter, level) in enumerate(zip(self.levels, self.levels[1:], strict=False), 2):
            here = np.flatnonzero(place_P >= n - 1)
            context = grams_P[here - 1]
            keys_G = level.contexts_G * len(self.symbols) + level.symbols_G
            keys = context * len(self.symbols) + ids_P[here]
            found = np.minimum(np.searchsorted(keys_G, keys), len(keys_G) - 1)
            seen = (context >= 0) & (keys_G[found] == keys)
            left = np.where(context >= 0, shorter.backoffs_G[context], 0.0)
            log_probs_P[here] = np.where(seen, level.log_probs_G[found], left + log_probs_P[here])
            grams_P = np.full_like(ids_P, -1)
            grams_P[here] = np.where(seen, found, -1)
        found_P: np.ndarray = log_probs_P[place_P > 0]
        return found_P

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> float:
        """Per symbol, ends of sentences included."""
        return float(np.exp(-self.log_probs(sentences).mean()))

    def write_arpa(self, path: Path) -> None:
        """Write an ARPA file, atomically; base 10, seven decimals."""
        with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
            file.write("\\data\\\n")
            file.writelines(f"ngram {n}={len(lv.symbols_G)}\n" for n, lv in enumerate(self.levels, 1))
            texts: list[str] = []
            for n, level in enumerate(self.levels, 1):
                file.write(f"\n\\{n}-grams:\n")
                last = [self.symbols[i] for i in level.symbols_G]
                pairs = zip(level.contexts_G, last, strict=True)
                texts = [f"{texts[c]} {symbol}" for c, symbol in pairs] if n > 1 else last
                log_probs = np.maximum(level.log_probs_G / _LN_10, _NEVER).tolist()
                if n == len(self.levels):
                    file.writelines(f"{p:.7f}\t{t}\n" for p, t in zip(log_probs, texts, strict=True))
                else:
                    rows = zip(log_probs, texts, (level.backoffs_G / _LN_10).tolist(), strict=True)
                    file.writelines(f"{p:.7f}\t{t}\t{b:.7f}\n" for p, t, b in rows)
            file.write("\n\\end\\\n")


def escape(symbol: str) -> str:
    """``symbol`` as ARPA files can hold it: never empty, without white space, no mark of theirs.

    A backslash begins ``\\e`` (the empty symbol), ``\\u0020`` (white space, by code point), and stands
    before itself and before a symbol that reads like a mark. ``<unk>`` stays: it is the unknown.
    """
    if not symbol:
        return "\\e"
    if symbol in (BOS, EOS, "<UNK>"):  # KenLM takes <UNK> for <unk>
        return "\\" + symbol
    return "".join(
        "\\\\" if c == "\\" else f"\\u{ord(c):04x}" if c.isspace() or c == "\0" else c for c in symbol
    )


# ---------------------------------------------------------------- estimation


def estimate(sentences: Iterable[Sequence[str]], order: int, vocabulary: Iterable[str] = ()) -> Ngram:
    """Estimate an n-gram model.

    Args:
        sentences: symbols, without sentence marks; any text is a symbol, see :func:`escape`.
        order: the highest n; lowered to what the longest sentence has.
        vocabulary: symbols that get probability even if no sentence has them.

    Raises:
        DataError: there are no sentences.
    """
    lines = [list(sentence) for sentence in sentences]
    if not lines:
        raise DataError("no text to estimate a language model from", where="lm")
    known = {escape(s) for s in {*vocabulary, *chain.from_iterable(lines)}}
    symbols = (UNK, BOS, EOS, *sorted(known - {UNK}))
    ids_P, place_P = _flatten(lines, {s: i for i, s in enumerate(symbols)})
    counted = _count(ids_P, place_P, order, len(symbols))
    levels = [_unigrams(_adjusted_counts(counted, 1))]
    for n in range(2, len(counted) + 1):
        backoffs_G, level = _level(counted, n, levels[-1], ids_P)
        levels[-1] = replace(levels[-1], backoffs_G=backoffs_G)
        levels.append(level)
    return Ngram(symbols, tuple(levels))


@dataclass(frozen=True)
class _Counted:
    """The n-grams of one order in a text.

    Args:
        grams_P: int64, index of the n-gram that ends at each position; -1 if it starts before the sentence.
        ends_G: a position at which each ends.
        counts_G: how often each occurs.
        opening_G: bool, whether each begins a sentence, its mark included.
    """

    grams_P: np.ndarray
    ends_G: np.ndarray
    counts_G: np.ndarray
    opening_G: np.ndarray


def _flatten(sentences: Iterable[Sequence[str]], index: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all symbols, each sentence between its markers, and the position of each within its sentence."""
    lines = [[_BOS, *(index.get(escape(s), _UNK) for s in sentence), _EOS] for sentence in sentences]
    lengths = np.fromiter(map(len, lines), dtype=np.int64, count=len(lines))
    ids_P = np.fromiter(chain.from_iterable(lines), dtype=np.int64, count=int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    return ids_P, np.arange(len(ids_P)) - np.repeat(starts, lengths)


def _count(ids_P: np.ndarray, place_P: np.ndarray, order: int, num_symbols: int) -> list[_Counted]:
    """N-grams of order 1 to ``order``, as far as sentences are long enough; all symbols are 1-grams."""
    nowhere_G = np.zeros(num_symbols, dtype=np.int64)  # not used: a 1-gram is its symbol
    opening_G = np.arange(num_symbols) == _BOS
    counted = [_Counted(ids_P, nowhere_G, np.bincount(ids_P, minlength=num_symbols), opening_G)]
    for n in range(2, order + 1):
        here = np.flatnonzero(place_P >= n - 1)
        if not len(here):
            break
        keys = counted[-1].grams_P[here - 1] * num_symbols + ids_P[here]
        _, ends_G, index, counts_G = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        ends_G = here[ends_G]
        grams_P = np.full_like(ids_P, -1)
        grams_P[here] = index
        counted.append(_Counted(grams_P, ends_G, counts_G, place_P[ends_G] == n - 1))
    return counted


def _adjusted_counts(counted: Sequence[_Counted], n: int) -> np.ndarray:
    """By how many symbols each n-gram is preceded.

    For n-grams that begin a sentence, and for those of the highest order: how often they occur.
    """
    own = counted[n - 1]
    if n == len(counted):
        adjusted_G: np.ndarray = own.counts_G.copy()
    else:
        suffixes = own.grams_P[counted[n].ends_G]
        adjusted_G = np.bincount(suffixes, minlength=len(own.counts_G))
        adjusted_G[own.opening_G] = own.counts_G[own.opening_G]
    if n == 1:
        adjusted_G[_BOS] = 0  # it is never said
    return adjusted_G


def _discounts(adjusted_G: np.ndarray) -> np.ndarray:
    """What is taken from adjusted counts of 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26)."""
    t1, t2, t3, t4 = (int((adjusted_G == k).sum()) for k in (1, 2, 3, 4))
    if t1 and t2 and t3:
        y = t1 / (t1 + 2 * t2)
        found = (0.0, 1 - 2 * y * t2 / t1, 2 - 3 * y * t3 / t2, 3 - 4 * y * t4 / t3)
        if all(d > 0 for d in found[1:]):
            return np.array(found)
    return np.array(_FALLBACK_DISCOUNTS)


def _unigrams(adjusted_G: np.ndarray) -> Level:
    """1-grams, interpolated with equal shares for all symbols; backoffs are yet to come."""
    discounts_G = _discounts(adjusted_G)[np.minimum(adjusted_G, 3)]
    share = discounts_G.sum() / (len(adjusted_G) - 1)
    probs_G = (adjusted_G - discounts_G + share) / adjusted_G.sum()
    probs_G[_BOS] = 0.0
    index_G, zeros_G = np.arange(len(adjusted_G)), np.zeros(len(adjusted_G))
    with np.errstate(divide="ignore"):
        return Level(zeros_G.astype(np.int64), index_G, np.log(probs_G), zeros_G)


def _level(
    counted: Sequence[_Counted], n: int, shorter: Level, ids_P: np.ndarray
) -> tuple[np.ndarray, Level]:
    """Backoffs of the (n-1)-grams, and the n-grams without theirs."""
    own, before = counted[n - 1], counted[n - 2]
    adjusted_G = _adjusted_counts(counted, n)
    discounts_G = _discounts(adjusted_G)[np.minimum(adjusted_G, 3)]
    contexts_G, suffixes_G = before.grams_P[own.ends_G - 1], before.grams_P[own.ends_G]
    num_contexts = len(before.counts_G)
    totals = np.bincount(contexts_G, weights=adjusted_G, minlength=num_contexts)
    taken = np.bincount(contexts_G, weights=discounts_G, minlength=num_contexts)
    left = np.divide(taken, totals, out=np.ones(num_contexts), where=totals > 0)
    probs_G = (adjusted_G - discounts_G) / totals[contexts_G]
    probs_G += left[contexts_G] * np.exp(shorter.log_probs_G[suffixes_G])
    level = Level(contexts_G, ids_P[own.ends_G], np.log(probs_G), np.zeros(len(probs_G)))
    return np.log(left), level


# ---------------------------------------------------------------- use


class NgramModel:
    """A :class:`~kdrecipe.interfaces.LanguageModel` of token ids, by KenLM, which is loaded at its first use.

    Args:
        path: an ARPA file over the pieces, of order 2 to 6 (or KenLM's binary form of one).
        symbols: piece of each token id; those that the file lacks count as ``<unk>``.

    Raises:
        MissingExtra: at the first use: KenLM is not installed.
        KdrecipeError: the file is missing; at the first use: KenLM can't read it.
    """

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        if not path.is_file():
            raise KdrecipeError("missing file", where=str(path), remedy="run the stage that writes it")
        self.path = path
        self._words = [escape(symbol) for symbol in symbols]

    def start(self) -> Any:
        """The state before the first token of a sentence."""
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, token: int) -> tuple[float, Any]:
        """Natural log-probability of ``token`` after ``state``, and the state after it."""
        after = self._new_state()
        return self._model.BaseScore(state, self._words[token], after) * _LN_10, after

    def end(self, state: Any) -> float:
        """Natural log-probability that the sentence ends after ``state``."""
        return float(self._model.BaseScore(state, EOS, self._new_state()) * _LN_10)

    @cached_property
    def _new_state(self) -> Any:
        return _kenlm().State

    @cached_property
    def _model(self) -> Any:
        kenlm = _kenlm()
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            return kenlm.Model(str(self.path), config)
        except (OSError, RuntimeError) as error:
            raise KdrecipeError(
                f"KenLM can't read it: {str(error).strip()}",
                where=str(self.path),
                remedy="delete it and rerun its stage; ARPA files of order 2 to 6 are what it reads",
            ) from None


def _kenlm() -> Any:
    try:
        import kenlm
    except ImportError:
        raise MissingExtra("kenlm", "a language model in the search", INSTALL_KENLM) from None
    return kenlm


def load_lm(directory: Path, tokens: TokenTable, pieces: Sequence[str]) -> NgramModel:
    """The language model that stage 2 wrote, over the tokens of a bundle.

    Args:
        directory: with ``tokens.arpa`` and ``lm.json``.
        tokens: of the bundle.
        pieces: the same, by id.

    Raises:
        KdrecipeError: the bundle's tokens are others than the recipe's, or KenLM can't be used.
    """
    if read_json(directory / "lm.json")["vocab_id"] != tokens.vocab_id:
        raise KdrecipeError(
            "the language model is over the recipe's tokens, the bundle has others",
            where=str(directory),
            remedy="search this system without a language model (lm_weight: 0)",
        )
    return NgramModel(directory / "tokens.arpa", pieces)
