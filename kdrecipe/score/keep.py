"""Which of a teacher's hypotheses are good enough to be labels, and why the others are not."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, model_validator

from kdrecipe.errors import DataError
from kdrecipe.interfaces import Options
from kdrecipe.spoken_numbers import digits_left
from kdrecipe.text import excerpt

NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

EMPTY, LOOP = "empty", "loop"
"""Reasons that no option turns off."""

_LOOP = re.compile(r"(.{2,200}?)\1{5,}|(.)\2{7,}")
_LONGEST_UNIT = 20  # words that are looked for again right after themselves
MIN_CHARS = 60
"""Of fewer characters, zlib's own 11 bytes decide the compression ratio."""

EXAMPLES = 2  # of each reason


@dataclass(frozen=True)
class Said:
    """A hypothesis and what is known of it.

    Args:
        utterance: its id.
        text: as it would be a transcript: after ``text`` (:class:`kdrecipe.text_form.TextForm`).
        duration_s: of the audio, seconds.
        avg_log_prob: mean natural log-probability of its tokens; None: not known.
        no_speech_prob: the teacher's probability that nobody speaks; None: not known.
        transcript: what a person wrote, in the same form; None: nobody did.
    """

    utterance: str
    text: str
    duration_s: float
    avg_log_prob: float | None = None
    no_speech_prob: float | None = None
    transcript: str | None = None


class Keep(Options):
    """``keep``: bounds that a hypothesis must hold to be a label; ``null`` turns one off.

    Empty hypotheses are never kept, nor loops: the same six times in a row, or eight equal characters. What
    is not known of a hypothesis does not drop it.

    Args:
        min_avg_log_prob: mean natural log-probability of its tokens, 0 at best.
        max_no_speech_prob: the teacher's probability that nobody speaks.
        max_compression_ratio: bytes over bytes that zlib leaves; of texts of :data:`MIN_CHARS` or more.
        max_repetition: share of its words that say again what was just said; of a single word (or a script
            without spaces), of its characters.
        chars_per_s: fewest and most characters per second of audio, spaces not counted.
        digits: whether texts with digits are kept.
        max_wer: words, against the transcript where there is one; a share.
        max_cer: characters, as ``max_wer``.
    """

    min_avg_log_prob: Annotated[float, Field(le=0)] | None = -1.0
    max_no_speech_prob: Share | None = 0.6
    max_compression_ratio: NotNegative | None = 2.4
    max_repetition: Share | None = 0.5
    chars_per_s: tuple[NotNegative, NotNegative] | None = (1.0, 30.0)
    digits: bool = True
    max_wer: NotNegative | None = None
    max_cer: NotNegative | None = None

    @model_validator(mode="after")
    def _range(self) -> Keep:
        if self.chars_per_s and self.chars_per_s[0] > self.chars_per_s[1]:
            low, high = self.chars_per_s
            raise ValueError(f"chars_per_s is a range: the lower end first, not [{low:g}, {high:g}]")
        return self

    def judge(self, said: Said) -> list[str]:
        """Why ``said`` is not kept: :data:`EMPTY`, :data:`LOOP` and names of options; empty: it is."""
        if not _plain(said.text):
            return [EMPTY]
        figures = self._figures(said)
        reasons = [LOOP] if loops(said.text) else []
        for name, value in figures.items():
            bound = getattr(self, name)
            if value is None or bound is None:
                continue
            if name == "chars_per_s":
                within = bound[0] <= value <= bound[1]
            else:  # NaN, of a teacher that broke down, is within nothing
                within = value >= bound if name.startswith("min_") else value <= bound
            reasons += [] if within else [name]
        if not self.digits and digits_left(said.text):
            reasons.append("digits")
        return reasons

    def sort(self, said: Iterable[Said]) -> Kept:
        """Judge every hypothesis.

        Raises:
            DataError: nothing is kept.
        """
        found = Kept(self)
        for one in said:
            found.add(one, self.judge(one))
        found.check()
        return found

    def _figures(self, said: Said) -> dict[str, float | None]:
        """Option -> what is held against it, in the order in which reasons are given; None: not known."""
        import jiwer  # recipes are read by way of this module, without it

        letters = len(said.text.replace(" ", ""))
        return {
            "max_no_speech_prob": said.no_speech_prob,
            "min_avg_log_prob": said.avg_log_prob,
            "max_repetition": repetition(said.text),
            "max_compression_ratio": compression_ratio(said.text) if len(said.text) >= MIN_CHARS else None,
            "chars_per_s": letters / said.duration_s if said.duration_s > 0 else None,
            "max_wer": None if self.max_wer is None else _error_rate(jiwer.wer, said),
            "max_cer": None if self.max_cer is None else _error_rate(jiwer.cer, said),
        }


def _error_rate(rate: Callable[[str, str], float], said: Said) -> float | None:
    """Of what is said against what a person wrote; infinite where that is nothing."""
    if said.transcript is None:
        return None
    return rate(said.transcript, said.text) if said.transcript else math.inf


@dataclass
class Kept:
    """Hypotheses that are kept, and those that are not.

    Args:
        keep: what they were held against.
        kept: utterances, in their order.
        dropped: utterance -> reasons, the first of which it counts under.
        unknown: option that is set -> hypotheses of which its figure is not known, so that they pass.
        examples: first reason -> (utterance, text), a few.
        duration_s: seconds of audio that are kept.
        all_s: seconds of audio in all.
    """

    keep: Keep
    kept: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    duration_s: float = 0.0
    all_s: float = 0.0

    def add(self, said: Said, reasons: list[str]) -> None:
        """Enter one hypothesis with the reasons against it."""
        self.all_s += said.duration_s
        for option in ("min_avg_log_prob", "max_no_speech_prob"):
            if getattr(self.keep, option) is not None and getattr(said, option[4:]) is None:
                self.unknown[option] += 1
        if not reasons:
            self.kept.append(said.utterance)
            self.duration_s += said.duration_s
            return
        self.dropped[said.utterance] = reasons
        shown = self.examples.setdefault(reasons[0], [])
        if len(shown) < EXAMPLES:
            shown.append((said.utterance, said.text))

    def counts(self) -> dict[str, dict[str, int]]:
        """Reason -> ``first``, utterances that count under it, and ``any``, all that it speaks against."""
        first = Counter(reasons[0] for reasons in self.dropped.values())
        every = Counter(reason for reasons in self.dropped.values() for reason in reasons)
        return {reason: {"first": first[reason], "any": every[reason]} for reason, _ in every.most_common()}

    def lines(self) -> list[str]:
        """For the terminal: how many are kept, a line for each reason, examples below it."""
        total = len(self.kept) + len(self.dropped)
        found = [
            f"hypotheses: {len(self.kept)} of {total} are kept as labels, "
            f"{self.duration_s / 3600:.2f} of {self.all_s / 3600:.2f} h"
        ]
        for reason, count in self.counts().items():
            also = count["any"] - count["first"]
            more = f" ({also} more that count under another reason)" if also else ""
            found.append(f"  {_bound(self.keep, reason)}: {count['first']}{more}")
            for utterance, text in self.examples.get(reason, []):
                found.append(f"    {utterance}: {excerpt(text)!r}")
        for option, number in self.unknown.items():
            found.append(f"  {option}: the teacher does not say it of {number} of {total}, which pass")
        return found

    def check(self) -> None:
        """Whether anything is kept.

        Raises:
            DataError: nothing is.
        """
        if self.kept:
            return
        if not self.dropped:
            raise DataError("there are no hypotheses", where="keep", remedy="the subset has no audio")
        if all(reasons == [EMPTY] for reasons in self.dropped.values()):
            raise DataError(
                f"all {len(self.dropped)} hypotheses are empty",
                where="keep",
                remedy="listen to the audio; look at the teacher's language, and at what text: leaves over",
            )
        counts = self.counts()
        against = ", ".join(
            f"{_bound(self.keep, reason)}: {count['any']}" for reason, count in counts.items()
        )
        options = [reason for reason in counts if reason in Keep.model_fields]
        raise DataError(
            f"none of {len(self.dropped)} hypotheses is kept ({against}; one may have several reasons)",
            where="keep",
            remedy=f"loosen {options[0]}" if options else "this teacher does not suit the audio",
        )


def repetition(text: str) -> float:
    """Share of the words of ``text``, 0 to 1, that repeat what stands right before them.

    A run of equal parts, of one word or several, counts without its first: ``the the the`` is 2/3, and so is
    ``so I so I so I``. Of a text without spaces, characters are taken.
    """
    words = _plain(text).split()
    if len(words) == 1:
        words = list(words[0])
    if not words:
        return 0.0
    most = 0
    for unit in range(1, min(_LONGEST_UNIT, len(words) // 2) + 1):
        repeated, run = 0, 0
        for i in range(unit, len(words) + 1):
            if i < len(words) and words[i] == words[i - unit]:
                run += 1
                continue
            repeated += run - run % unit  # whole parts only
            run = 0
        most = max(most, repeated)
    return most / len(words)


def loops(text: str) -> bool:
    """Whether ``text`` says the same six times in a row, or a character eight times; whatever its case."""
    return _LOOP.search(_plain(text) + " ") is not None


def _plain(text: str) -> str:
    """``text`` without case and punctuation: ``Thank you. thank you`` says the same twice."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def compression_ratio(text: str) -> float:
    """Bytes of ``text`` over the bytes that zlib makes of them, as Whisper takes it."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _bound(keep: Keep, reason: str) -> str:
    """A reason with the bound that it is about."""
    values: Mapping[str, object] = keep.model_dump()
    if reason not in values or reason == "digits":
        return reason
    value = values[reason]
    low_high = isinstance(value, tuple) and "-".join(f"{float(x):g}" for x in value)
    return f"{reason} {low_high or f'{value:g}'}"
