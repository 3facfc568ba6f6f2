"""The one rule for text: how a transcript, a hypothesis or a line of a text file is written.

Whatever is trained on, encoded, counted or compared has gone through :func:`clean`, so that two texts that
a reader can't tell apart are one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

WORD_START = "\u2581"
"""SentencePiece's mark on a piece that begins a word."""

_BOM = "\ufeff"
_WHITE_CONTROLS = frozenset("\t\n\v\f\r\x85")  # control characters that are meant as white space
_JOINERS = frozenset("\u200c\u200d")  # part of the spelling of Persian, Hindi and others


def clean(text: str) -> str:
    """``text`` in Unicode normal form C, with one space for any white space, none at the ends.

    White space is what Unicode calls so (tab, no-break space, U+0085, U+2028, U+3000, ...) and the byte
    order mark. Nothing else changes: a full-width letter, ``½`` or a ligature is not an ordinary letter.
    """
    return " ".join(unicodedata.normalize("NFC", text).replace(_BOM, " ").split())


def lower(text: str, language: str | None = None) -> str:
    """``text`` in small letters, as ``language`` has them.

    In Turkish and Azerbaijani (``tr``, ``az``) I is the capital of ı, in Lithuanian (``lt``) i keeps its dot
    under an accent.
    """
    if language in ("tr", "az"):
        return text.replace("İ", "i").replace("I", "ı").lower()
    text = text.lower()
    if language == "lt":  # a dot above i, į or j, before a further accent
        text = re.sub("([ij]\u0328?)\u0307", r"\1", unicodedata.normalize("NFD", text))
    return text


def upper(text: str, language: str | None = None) -> str:
    """``text`` in capitals, as ``language`` has them: in Turkish and Azerbaijani i becomes İ."""
    return (text.replace("i", "İ") if language in ("tr", "az") else text).upper()


def control_characters(text: str) -> list[str]:
    """The characters of ``text`` that no transcript can mean: NUL and its like, half a surrogate pair."""
    if text.isprintable():
        return []
    kinds = {"Cc", "Cs"}
    return [c for c in text if unicodedata.category(c) in kinds and c not in _WHITE_CONTROLS]


def odd_characters(text: str) -> list[str]:
    """The characters of ``text`` that a reader can't see or takes for a space.

    These are white space other than the space, the byte order mark (all of which :func:`clean` makes spaces),
    and invisible ones such as the soft hyphen (which stay, and count as characters).
    """
    if text.isprintable():
        return []
    return [
        c
        for c in text
        if c != " " and (c.isspace() or (unicodedata.category(c) == "Cf" and c not in _JOINERS))
    ]


def shown(characters: Iterable[str]) -> str:
    """Characters for a message, each with its code point: ``ü (U+00FC), U+2028``."""
    found = []
    for c in characters:
        code = f"U+{ord(c):04X}"
        seen = c.isprintable() and not c.isspace() and not unicodedata.combining(c)
        found.append(f"{c} ({code})" if seen else code)
    return ", ".join(found)


def excerpt(text: str, most: int = 60) -> str:
    """``text`` for a message: its first ``most`` characters."""
    return text if len(text) <= most else text[:most].rstrip() + " ..."


def lines(text: str) -> list[str]:
    """The lines of ``text``, which end at ``\\n`` and nowhere else.

    ``str.splitlines`` also splits at U+0085, U+2028 and others, which a transcript or a token may hold.
    """
    found = text.split("\n")
    return found if found[-1] else found[:-1]


def read_lines(path: Path) -> list[str]:
    """The :func:`lines` of a UTF-8 file, as they are.

    Raises:
        OSError: it can't be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    return lines(path.read_bytes().decode("utf-8"))
