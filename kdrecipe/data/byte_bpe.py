"""Tokens of another model: its byte-level BPE (GPT-2's, Whisper's), trimmed to what the training text uses.

A symbol is a string of the tokeniser's file: one character per byte, GPT-2's for those that can't be printed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.text import WORD_START, clean

END_OF_TEXT = "<|endoftext|>"
_CONTRACTION = re.compile("'(?:[stmd]|re|ve|ll)")
_RUN = re.compile(r" ?a+| ?1+| ?\.+| ")  # of letters, digits, others, on their kinds


@lru_cache(maxsize=1)
def byte_symbols() -> list[str]:
    """The symbol of each byte: itself where it is printed, else the next free character from U+0100."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


@lru_cache(maxsize=1)
def _bytes_of_symbols() -> dict[str, int]:
    return {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def as_bytes(symbol: str) -> bytes:
    """What a symbol stands for."""
    return bytes(map(_bytes_of_symbols().__getitem__, symbol))


def words(text: str) -> Iterator[str]:
    """The parts of a clean ``text`` within which tokens are merged, by GPT-2's rule: words with a space."""
    kinds = "".join(map(_kind, text))
    at = 0
    while at < len(text):
        found = _CONTRACTION.match(text, at) or _RUN.match(kinds, at)
        assert found, text
        yield found[0] if found.re is _CONTRACTION else text[at : found.end()]
        at = found.end()


def _kind(c: str) -> str:
    return " " if c == " " else {"L": "a", "N": "1"}.get(unicodedata.category(c)[0], ".")


class Merges:
    """Byte-pair encoding by a list of merges, the first of which come first."""

    def __init__(self, pairs: Iterable[Sequence[str]]) -> None:
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(pairs)}
        self.parents = {a + b: (a, b) for a, b in self.ranks}

    def symbols(self, word: str) -> list[str]:
        """The symbols of a word after all merges."""
        found = [byte_symbols()[byte] for byte in word.encode("utf-8", "replace")]
        while len(found) > 1:
            pairs = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(found)]
            best = min(pairs)
            if best == len(self.ranks):
                break
            at = pairs.index(best)
            found[at : at + 2] = [found[at] + found[at + 1]]
        return found

    def split(self, symbol: str, known: Mapping[str, int]) -> list[str]:
        """``symbol`` if it is ``known``, else what it is merged from, down to bytes, which are known."""
        if symbol in known:
            return [symbol]
        return [part for parent in self.parents[symbol] for part in self.split(parent, known)]

    def ancestry(self, symbols: Iterable[str]) -> list[tuple[str, str]]:
        """The merges that lead to ``symbols``, in order: with these alone, texts that are made of them are
        encoded as with all."""
        needed: set[tuple[str, str]] = set()
        pending = [symbol for symbol in symbols if symbol in self.parents]
        while pending:
            pair = self.parents[pending.pop()]
            if pair not in needed:
                needed.add(pair)
                pending += [part for part in pair if part in self.parents]
        return sorted(needed, key=self.ranks.__getitem__)


class ByteBpe:
    """A list of tokens by byte-level BPE; nothing is unknown to it, since every byte is a token.

    Args:
        content: of :attr:`file`: ``symbols`` from id 3, the bytes first, the teacher's id of each
            (``origin``), the ``merges`` that lead to them, and the teacher's id of the ``end_of_text``.

    Raises:
        ValueError, KeyError, TypeError: it is no such file.
    """

    file: ClassVar[str] = "bpe.json"
    what: ClassVar[str] = "byte-level BPE"

    def __init__(self, content: bytes) -> None:
        self.content = content
        read: dict[str, Any] = json.loads(content)
        self._symbols: list[str] = read["symbols"]
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols, start=3)}
        self._merges = Merges(read["merges"])
        if self._symbols[:256] != byte_symbols() or len(read["origin"]) != len(self._symbols):
            raise ValueError("tokens are missing")
        self.origin: list[int | None] = [None, read["end_of_text"], None, *read["origin"]]
        """The teacher's id of each of these tokens; None: it has no such token. See
        :func:`kdrecipe.frames.over_tokens` for its posteriors."""

    @classmethod
    def trimmed(cls, tokenizer_json: Path, texts: Iterable[str], reserved: frozenset[str]) -> ByteBpe:
        """The tokens that a teacher's own tokeniser makes of ``texts``, and all bytes.

        Every text begins with a space, as Whisper writes it. Tokens that can't be listed by themselves,
        such as half a letter, are left out: they are spelled in bytes.

        Args:
            tokenizer_json: of a Hugging Face model.
            texts: training transcripts.
            reserved: names that no token may have.

        Raises:
            RecipeError: it is no byte-level BPE by GPT-2's rule.
            DataError: there is no text.
        """
        vocabulary, merges = _read(tokenizer_json)
        distinct = {word for text in texts for word in words(" " + clean(text)) if text.strip()}
        if not distinct:
            raise DataError(
                "no text to see tokens in", where="tokens", remedy="give transcripts, or a teacher's texts"
            )
        seen = {symbol for word in distinct for symbol in merges.symbols(word)}
        listed = [s for s in seen if len(s) > 1 and _name(s) not in {None, *reserved}]
        symbols = [*byte_symbols(), *sorted(listed, key=vocabulary.__getitem__)]
        content = {
            "symbols": symbols,
            "origin": [vocabulary[symbol] for symbol in symbols],
            "end_of_text": vocabulary.get(END_OF_TEXT),
            "merges": merges.ancestry(symbols),
        }
        return cls(json.dumps(content, ensure_ascii=False).encode())

    @cached_property
    def pieces(self) -> list[str]:
        """Names of the tokens from id 3, as runtimes read them: the bytes ``<0x00>`` to ``<0xFF>``, which
        sherpa-onnx knows if they stand in a row, then texts, of which ``▁`` begins a word."""
        return list(map(piece, self._symbols))

    def encode(self, text: str) -> list[int]:
        """Ids of a clean text."""
        return [i for word in words(" " + text) for i in self._word(word)] if text else []

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids from 3 on, with the space before its first word; what is no UTF-8 is left out, as in
        sherpa-onnx."""
        return b"".join(as_bytes(self._symbols[i - 3]) for i in ids).decode("utf-8", "ignore")

    def _word(self, word: str) -> list[int]:
        if word not in self._known_words:
            merged = self._merges.symbols(word)
            found = [part for symbol in merged for part in self._merges.split(symbol, self._ids)]
            self._known_words[word] = [self._ids[part] for part in found]
        return self._known_words[word]

    @cached_property
    def _known_words(self) -> dict[str, list[int]]:
        return {}


def piece(symbol: str) -> str:
    """How a list names a token: ``<0x61>`` of a byte, else its text, or the symbol where it is none."""
    if len(symbol) == 1 and symbol in _bytes_of_symbols():
        return f"<0x{_bytes_of_symbols()[symbol]:02X}>"
    return _name(symbol) or symbol


def _name(symbol: str) -> str | None:
    """A token as a list can have it, or None: no text of its own, or one that would be taken for another."""
    try:
        text = as_bytes(symbol).decode()
    except (UnicodeDecodeError, KeyError):  # part of a letter; no byte symbol at all
        return None
    name = text.replace(" ", WORD_START, 1) if text.startswith(" ") else text
    odd = " " in name or WORD_START in text or re.fullmatch("<0x[0-9A-F]{2}>", text)
    return None if odd or not name.isprintable() else name


def _read(path: Path) -> tuple[dict[str, int], Merges]:
    """A Hugging Face ``tokenizer.json``: ids by symbol (those of special tokens, too), and merges."""
    remedy = "tokens are taken from Whisper and others of GPT-2's kind; else name bpe, unigram or char"
    try:
        read = json.loads(path.read_bytes())
        model, before = read["model"], read["pre_tokenizer"]
        if before["type"] != "ByteLevel" or not before.get("use_regex", True) or read.get("normalizer"):
            raise ValueError("another rule")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in read["added_tokens"]}}
        merges = Merges(pairs)
        if not {*byte_symbols(), *merges.parents} <= vocabulary.keys():
            raise ValueError("symbols without an id")
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=str(path), remedy=remedy) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError("no tokeniser by byte-level BPE", where=str(path), remedy=remedy) from None
    return vocabulary, merges
