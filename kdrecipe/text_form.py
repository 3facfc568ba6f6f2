"""How texts that another model wrote become like a recipe's transcripts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import field_validator

from kdrecipe.interfaces import Options
from kdrecipe.spoken_numbers import as_words, check_language, digits_left
from kdrecipe.text import clean, excerpt, lower, upper

_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ＇´`", "'"))
_HYPHENS = str.maketrans(dict.fromkeys("\u2010\u2011", "-"))
_BRACKETS = (re.compile(r"\[[^\]]*\]"), re.compile(r"\([^)]*\)"), re.compile(r"<[^>]*>"), re.compile("[♩-♯]"))
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*\.?")
_RARE = 0.01  # a share of transcripts that has a sign by mistake

_LONG_FORMS = {
    **{"mr": ("mister",), "mrs": ("missus", "missis"), "dr": ("doctor",), "st": ("saint",)},
    **{"prof": ("professor",), "capt": ("captain",), "col": ("colonel",), "lt": ("lieutenant",)},
    **{"gen": ("general",), "gov": ("governor",), "rev": ("reverend",), "sr": ("senior",)},
    **{"jr": ("junior",), "ok": ("okay",), "percent": ("per cent",)},
}
"""English words that many write short, and the forms in which transcripts may have them."""


class TextForm(Options):
    """How a teacher's texts become transcripts; ``auto`` is as the recipe's transcripts have it.

    Where there are no transcripts, ``auto`` is the first of the other values.

    Args:
        case: of all letters.
        punctuation: all marks and symbols, apostrophes and hyphens apart; in numbers (3.5) they stay.
        hyphens: those within words: ``space`` makes two words of one.
        apostrophes: ``inner`` keeps those within words and takes others for quotation marks, which go as
            punctuation does. All are written ``'``.
        numbers: ``words`` writes digits as words, by num2words.
        brackets: ``remove`` drops what is in ``[]``, ``()`` and ``<>``, and notes of music: what is heard and
            not said.
        replace: words that are to be written otherwise, whatever their case: ``{mr: mister}``.
        language: of the numbers and the letters: ``en``, ``de``, ``tr``, ...
    """

    case: Literal["auto", "lower", "upper", "keep"] = "auto"
    punctuation: Literal["auto", "remove", "keep"] = "auto"
    hyphens: Literal["auto", "space", "keep"] = "auto"
    apostrophes: Literal["auto", "inner", "keep", "remove"] = "auto"
    numbers: Literal["auto", "words", "keep"] = "auto"
    brackets: Literal["remove", "keep"] = "remove"
    replace: dict[str, str] | Literal["auto"] = "auto"
    language: str = "en"

    @field_validator("replace")
    @classmethod
    def _replaces_once(cls, value: dict[str, str] | str) -> dict[str, str] | str:
        if isinstance(value, str):
            return value
        table = {word.casefold(): new for word, new in value.items()}
        for word, new in value.items():
            if not re.fullmatch(r"[^\W_]+(?:'[^\W_]+)*", word) or digits_left(word + new):
                raise ValueError(f"{word!r}: {new!r}: a single word, and what to write for it, in letters")
            again = [part for part in _WORD.findall(new) if part.rstrip(".").casefold() in table]
            if again:
                raise ValueError(f"{word!r} becomes {new!r}, and {again[0]!r} is to be replaced, too")
        return value

    def fitted(self, transcripts: Iterable[str]) -> TextForm:
        """This form with every ``auto`` decided by how ``transcripts`` are written."""
        found = _habits([text for text in map(clean, transcripts) if text], self.language)
        return self.model_copy(update={k: v for k, v in found.items() if getattr(self, k) == "auto"})

    @classmethod
    def like(cls, transcripts: Iterable[str], language: str = "en") -> TextForm:
        """The form in which ``transcripts`` are written."""
        return cls(language=language).fitted(transcripts)

    def check(self, where: str = "") -> None:
        """Whether texts can be brought into this form on this machine.

        Raises:
            MissingExtra: numbers are to be words, and num2words is not installed.
            RecipeError: it does not know the language.
        """
        if self.numbers in ("auto", "words"):
            check_language(self.language, where)

    def apply(self, text: str) -> str:
        """``text`` in this form, by :func:`kdrecipe.text.clean`; applied twice, it changes nothing more.

        Raises:
            MissingExtra, RecipeError: as :meth:`check`, where a text has digits.
        """
        text = clean(text)
        for _, step in self._steps():
            text = step(text)
        return clean(text)

    def changes(self, texts: Iterable[str]) -> TextChanges:
        """What :meth:`apply` does to ``texts``, counted and with examples."""
        found = TextChanges()
        for text in texts:
            before = written = clean(text)
            by_kind = {}
            for kind, step in self._steps():
                after = step(written)
                if clean(after) != clean(written):
                    by_kind[kind] = _difference(clean(written), clean(after))
                written = after
            found.add(before, clean(written), by_kind)
        return found

    def _steps(self) -> Iterator[tuple[str, Callable[[str], str]]]:
        """What is done, in this order. Numbers first, whose marks are punctuation; then case, since a letter
        may become two, an apostrophe among them."""
        if self.numbers != "keep":
            yield "numbers", lambda text: as_words(text, self.language)
        if self.case != "keep":
            yield "case", self._cased
        yield "apostrophes", self._with_apostrophes
        if isinstance(self.replace, dict) and self.replace:
            yield "words replaced", self._replaced
        if self.brackets == "remove":
            yield "brackets", _without_brackets
        yield "punctuation", self._punctuated

    def _cased(self, text: str) -> str:
        return upper(text, self.language) if self.case == "upper" else lower(text, self.language)

    def _with_apostrophes(self, text: str) -> str:
        text = text.translate(_APOSTROPHES)
        return text.replace("'", "") if self.apostrophes == "remove" else text

    def _replaced(self, text: str) -> str:
        assert isinstance(self.replace, dict)
        table = {word.casefold(): new for word, new in self.replace.items()}

        def new(match: re.Match[str]) -> str:
            word = match[0].rstrip(".")
            if word.casefold() not in table:
                return match[0]
            ends = match.end() == len(text) and match[0].endswith(".")  # of the sentence, not of Mr.
            written = table[word.casefold()]
            return (written if self.case == "keep" else self._cased(written)) + ("." if ends else "")

        return _WORD.sub(new, text)

    def _punctuated(self, text: str) -> str:
        text = text.translate(_HYPHENS)
        return "".join(c if self._stays(text, i, c) else " " for i, c in enumerate(text))

    def _stays(self, text: str, i: int, c: str) -> bool:
        if unicodedata.category(c)[0] not in "PS":
            return True
        around = (text[i - 1 : i], text[i + 1 : i + 2])
        within = all(n and unicodedata.category(n)[0] in "LMN" for n in around)
        if c == "-" and within:
            return self.hyphens == "keep"
        if c == "'" and (self.apostrophes == "keep" or within):
            return True
        in_number = c in ".,:" and all(map(str.isdecimal, around))
        return self.punctuation == "keep" or in_number


@dataclass
class TextChanges:
    """What a :class:`TextForm` did to texts.

    Args:
        texts: how many there were.
        changed: how many are written otherwise now.
        kinds: kind of change -> texts.
        emptied: texts of which nothing is left.
        digits: texts that still have digits.
        examples: kind of change -> (before, after), a few, of the words that it was about.
    """

    texts: int = 0
    changed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    emptied: int = 0
    digits: int = 0
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    PER_KIND = 2

    def add(self, before: str, after: str, by_kind: Mapping[str, tuple[str, str]]) -> None:
        """Count one text, with what each kind of change did to it."""
        self.texts += 1
        self.changed += before != after
        self.kinds.update(by_kind.keys())
        self.emptied += bool(before) and not after
        self.digits += digits_left(after)
        for kind, example in by_kind.items():
            shown = self.examples.setdefault(kind, [])
            if len(shown) < self.PER_KIND and example not in shown:
                shown.append(example)

    def lines(self) -> list[str]:
        """For the terminal: how many changed, in what, and examples."""
        if not self.changed:
            return [f"texts: all {self.texts} are written like transcripts"]
        found = [f"texts: {self.changed} of {self.texts} are written otherwise now"]
        for kind, number in self.kinds.most_common():
            pairs = [f"{excerpt(a, 40)!r} -> {excerpt(b, 40)!r}" for a, b in self.examples[kind]]
            found.append(f"  {kind} {number}: {', '.join(pairs)}")
        if self.emptied:
            found.append(f"  nothing is left of {self.emptied}")
        if self.digits:
            found.append(f"  {self.digits} still have digits")
        return found


def _difference(before: str, after: str) -> tuple[str, str]:
    """Two texts without the words that they begin and end with alike, save one on either side."""
    a, b = before.split(), after.split()
    most = min(len(a), len(b))
    start = next((i for i in range(most) if a[i] != b[i]), most)
    end = next((i for i in range(most - start) if a[-1 - i] != b[-1 - i]), most - start)
    start, end = max(0, start - 1), max(0, end - 1)
    return " ".join(a[start : len(a) - end]), " ".join(b[start : len(b) - end])


def _without_brackets(text: str) -> str:
    for pattern in _BRACKETS:
        text = pattern.sub(" ", text)
    return text


def _habits(transcripts: Sequence[str], language: str) -> Mapping[str, object]:
    """Option of :class:`TextForm` -> its value in ``transcripts``."""
    if not transcripts:
        first = {"case": "lower", "punctuation": "remove", "hyphens": "space", "numbers": "words"}
        return {**first, "apostrophes": "inner", "replace": {}}

    def common(pattern: str) -> bool:
        return sum(bool(re.search(pattern, text)) for text in transcripts) > _RARE * len(transcripts)

    return {
        "case": _case(transcripts),
        "punctuation": "keep" if common(r"[^\w\s'’-](?!\w)") else "remove",
        "hyphens": "keep" if any(re.search(r"\w-\w", text) for text in transcripts) else "space",
        "apostrophes": _apostrophes(transcripts),
        "numbers": "keep" if common(r"\d") else "words",
        "replace": _long_forms(transcripts) if language[:2] == "en" else {},
    }


def _case(transcripts: Sequence[str]) -> str:
    capitals, small = (sum(map(kind, "".join(transcripts))) for kind in (str.isupper, str.islower))
    if not capitals or not small:
        return "keep" if capitals == small else "upper" if capitals else "lower"
    return "upper" if small < _RARE * capitals else "lower" if capitals < _RARE * small / 10 else "keep"


def _apostrophes(transcripts: Sequence[str]) -> str:
    signs = re.findall(r"(\w?)['’](\w?)", " ".join(transcripts))
    if not signs:
        return "remove"
    edges = sum(not (before and after) for before, after in signs)
    return "keep" if edges > 0.05 * len(signs) else "inner"


def _long_forms(transcripts: Sequence[str]) -> dict[str, str]:
    """Short words that the transcripts write out, as English ones may."""
    text = f" {' '.join(_WORD.findall(' '.join(transcripts).casefold()))} ".replace(". ", " ")
    found = {}
    for short, longs in _LONG_FORMS.items():
        used = [(text.count(f" {long} "), long) for long in longs]
        number, long = max(used)
        if number and f" {short} " not in text:
            found[short] = long
    return found
