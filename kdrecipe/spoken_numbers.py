"""Digits as the words that a speaker says for them.

The package num2words knows how each language says a number; what is here finds the numbers in a text and
tells it what they are: years, ordinals, money, times, telephone numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from importlib.util import find_spec

from kdrecipe.errors import MissingExtra, RecipeError

INSTALL = "pip install 'kdrecipe[numbers]'"

_POINT = frozenset({"en", "ja", "ko", "th", "he", "fa", "am", "bn", "kn", "te"})
"""Languages that write 1,000.5; all others write 1.000,5."""

_YEARS = frozenset({"en", "de", "no"})
"""Languages that say 1850 otherwise as a year, and whose years num2words knows."""

_ORDINAL_MARKS = {"en": "st|nd|rd|th", "fr": "ère|er|ème|eme|e", "nl": "ste|de|e"}
_PERCENT = {
    **{"en": "percent", "de": "Prozent", "fr": "pour cent", "es": "por ciento", "it": "per cento"},
    **{"nl": "procent", "pt": "por cento", "pl": "procent", "sv": "procent", "da": "procent"},
}
_AND = {"en": "and", "de": "und", "fr": "et", "es": "y", "it": "e", "nl": "en", "pt": "e"}
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP"}
_OLDEST_YEAR, _LATEST_YEAR = 1100, 2099
_LONGEST_NUMBER = 6  # digits without separators; more are a telephone number or the like


def digits_left(text: str) -> bool:
    """Whether ``text`` has digits of any script, ``²`` and ``½`` among them."""
    return any(unicodedata.category(c)[0] == "N" for c in text)


def check_language(language: str, where: str = "") -> None:
    """Whether numbers can be put into words of ``language``.

    Raises:
        MissingExtra: num2words is not installed.
        RecipeError: it does not know the language.
    """
    if find_spec("num2words") is None:
        raise MissingExtra("num2words", f"{where or 'text'}: numbers as words", INSTALL)
    from num2words import CONVERTER_CLASSES

    if language not in CONVERTER_CLASSES and language[:2] not in CONVERTER_CLASSES:
        raise RecipeError(
            f"num2words has no numbers of the language {language!r}",
            where=where,
            remedy=f"set numbers: keep, or one of the languages {', '.join(sorted(CONVERTER_CLASSES))}",
        )


def as_words(text: str, language: str) -> str:
    """``text`` with its numbers in words; what can't be said stays in digits (see :func:`digits_left`).

    Raises:
        MissingExtra, RecipeError: as :func:`check_language`, if there is a number.
    """
    if "&" in text and language[:2] in _AND:
        text = re.sub(r"(?<=\s)&(?=\s)", _AND[language[:2]], text)
    if not digits_left(text):
        return text
    check_language(language)
    pattern, sayings = _grammar(language)
    if language[:2] == "en":
        text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)

    def say(match: re.Match[str]) -> str:
        words = match[0]
        for kind in (match.lastgroup or "", "plain"):
            try:
                words = sayings[kind](match[0])
                break
            except Exception:  # a library of fifty grammars: what one of them can't say stays, and is counted
                continue
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return (" " if before.isalnum() else "") + words + (" " if after.isalnum() else "")

    return pattern.sub(say, text)


@lru_cache
def _grammar(language: str) -> tuple[re.Pattern[str], dict[str, Callable[[str], str]]]:
    """Which kinds of numbers the language has, the most special first, and how each is said."""
    tongue = _Tongue(language)
    number = tongue.number
    signs = f"[{''.join(_CURRENCIES)}]"
    kinds: list[tuple[str, str, Callable[[str], str]]] = [
        ("time", r"\b(?:[01]?\d|2[0-3]):[0-5]\d(?![\d:])", tongue.time),
        ("phone", r"(?:\+?\d{1,3}[-. ])?(?:\(\d{3}\) ?|\b\d{3}[-. ])\d{3}[-. ]\d{4}\b", tongue.digits),
        ("local", r"(?<![-\d])\b\d{3}-\d{4}\b", tongue.digits),
        ("percent", rf"{number}\s?%", tongue.percent),
    ]
    magnitude = r"(?:\s(?:hundred|thousand|million|billion|trillion)\b)?" if tongue.family == "en" else ""
    kinds.append(("money", rf"{signs}\s?{number}{magnitude}|{number}\s?{signs}", tongue.money))
    if tongue.family == "en":
        kinds += [
            ("decade", r"(?<![\w,.])'?(?:1\d|20)?\d0'?s\b", tongue.decade),
            ("fraction", r"(?<![\w/.,])(?:\d+ )?[1-9]/(?:[2-9]|10)(?![\w/])", tongue.fraction),
        ]
    if marks := _ORDINAL_MARKS.get(tongue.family):
        kinds.append(("ordinal", rf"{number}(?:{marks})\b", tongue.ordinal))
    kinds.append(("number", number, tongue.cardinal))
    pattern = "|".join(f"(?P<{kind}>{expression})" for kind, expression, _ in kinds)
    sayings = {kind: say for kind, _, say in kinds}
    sayings["plain"] = lambda text: re.sub(number, lambda match: tongue.cardinal(match[0]), text)
    return re.compile(pattern, re.IGNORECASE), sayings


class _Tongue:
    """How one language says each kind of number, all given as they are written."""

    def __init__(self, language: str) -> None:
        self.language, self.family = language, language[:2]
        group, point = (",", r"\.") if self.family in _POINT else (r"[. \u202f]", ",")
        self.number = rf"(?:\d{{1,3}}(?:{group}\d{{3}})+(?!\d)(?:{point}\d+)?|\d+(?:{point}\d+)?)"

    def cardinal(self, text: str) -> str:
        if text.isdecimal():
            if len(text) > _LONGEST_NUMBER or (len(text) > 1 and not int(text[0])):
                return self.digits(text)
            if len(text) == 4 and _OLDEST_YEAR <= int(text) <= _LATEST_YEAR and self.family in _YEARS:
                return self._say(int(text), "year")
        return self._say(self._value(text))

    def digits(self, text: str) -> str:
        return " ".join(self._say(int(c)) for c in text if c.isdecimal())

    def ordinal(self, text: str) -> str:
        return self._say(int(self._value(text)), "ordinal")

    def percent(self, text: str) -> str:
        return f"{self.cardinal(text[:-1].rstrip())} {_PERCENT.get(self.family, '%')}"

    def money(self, text: str) -> str:
        sign = next(c for c in text if c in _CURRENCIES)
        figure, *magnitude = text.replace(sign, " ").strip().split(maxsplit=1)
        if not magnitude or digits_left(magnitude[0]):
            value = self._value(text.replace(sign, "").strip())
            whole, _, cents = self._say(value, "currency", _CURRENCIES[sign]).partition("|")
            return whole if value == int(value) else f"{whole} {cents.strip()}"
        several = self._say(2, "currency", _CURRENCIES[sign]).partition("|")[0]
        return f"{self.cardinal(figure)} {magnitude[0]} {several.partition(' ')[2]}"

    def time(self, text: str) -> str:
        hour, minute = map(int, text.split(":"))
        said = self._say(hour)
        if self.family != "en":
            return f"{said} {self._say(minute)}" if minute else said
        if not minute:
            return f"{said} hundred" if hour > 12 else f"{said} o'clock" if hour else "midnight"
        return f"{said} {'oh ' if minute < 10 else ''}{self._say(minute)}"

    def decade(self, text: str) -> str:
        number = int("".join(c for c in text if c.isdecimal()))
        said = self._say(number, "year" if number >= _OLDEST_YEAR else "cardinal")
        return f"{said[:-1]}ies" if said.endswith("y") else f"{said}s"

    def fraction(self, text: str) -> str:
        *whole, part = text.split()
        top, bottom = map(int, part.split("/"))
        name = {2: "half", 4: "quarter"}.get(bottom) or self._say(bottom, "ordinal")
        if top > 1:
            name = "halves" if bottom == 2 else f"{name}s"
        said = f"{'a' if whole and top == 1 else self._say(top)} {name}"
        return f"{self.cardinal(whole[0])} and {said}" if whole else said

    def _value(self, text: str) -> Decimal:
        """The number that is written: ``1,000.5`` or ``1.000,5``, any other characters left out."""
        point = "." if self.family in _POINT else ","
        kept = "".join("." if c == point else str(int(c)) for c in text if c == point or c.isdecimal())
        return Decimal(kept.rstrip("."))

    def _say(self, number: int | Decimal, kind: str = "cardinal", currency: str = "") -> str:
        from num2words import num2words

        more = {"currency": currency, "separator": "|"} if currency else {}
        if isinstance(number, Decimal) and number == int(number) and not currency:
            number = int(number)
        said = str(num2words(number, lang=self.language, to=kind, **more))
        return said.replace(",", "").replace(" sterling", "")
