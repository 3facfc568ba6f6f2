"""The fields of recordings and supervisions hold what they must: text is text, numbers are finite numbers.

Manifests are written by hand and by scripts, and Lhotse takes any value of a field as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kdrecipe.corpus.problems import DataProblem
from kdrecipe.interfaces import Prepared


def wrong_field(item: Any) -> str | None:
    """What is wrong with a field of a :class:`lhotse.Recording` or a supervision; None: nothing.

    Names the first such field and its value: ``text is 911, it must be text``.
    """
    rules = _SUPERVISION if hasattr(item, "recording_id") else _RECORDING
    for name, (is_right, wanted) in rules.items():
        value = getattr(item, name)
        if not is_right(value):
            return f"{name} is {_short(value)}, it must be {wanted}"
    return None


def without_malformed(prepared: Prepared) -> Prepared:
    """A corpus plugin's result without recordings and supervisions that have a wrong field.

    They are in the problems of the result instead, as ``malformed``.
    """
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet

    splits, problems = {}, list(prepared.problems)
    for split, (recordings, supervisions) in prepared.splits.items():
        sound = []
        listed: Any = (recordings, supervisions)  # Lhotse's annotations do not let them be iterated
        for items in listed:
            wrong = [(item, wrong_field(item)) for item in items]
            sound.append([item for item, what in wrong if what is None])
            problems += [
                DataProblem(f"{split}: {what}", str(item.id), kind="malformed", id=str(item.id))
                for item, what in wrong
                if what is not None
            ]
        recs, sups = sound
        splits[split] = (RecordingSet.from_recordings(recs), SupervisionSet.from_segments(sups))
    return replace(prepared, splits=splits, problems=problems)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_text(value: Any) -> bool:
    """Text that can be written: JSON may hold half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name(value: Any) -> bool:
    return _is_text(value) and bool(value.strip())


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: Any) -> bool:
    """Negative ones are numbers, too: where a transcript may lie is another question."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_channel(value: Any) -> bool:
    channels = value if isinstance(value, list) else [value]
    return bool(channels) and all(map(_is_count, channels))


def _are_sources(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(s.type, str) and _are_channels(s.channels) and _has_place(s) for s in value)
    )


def _are_channels(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _has_place(source: Any) -> bool:
    return source.type == "memory" or _is_name(source.source)


_TEXT, _NAME = "text", "text that is not empty"
_COUNT, _SECONDS = "a whole number", "a finite number of seconds"
_RECORDING = {
    "id": (_is_name, _NAME),
    "sources": (_are_sources, "a list of {type, channels, source}, e.g. file, [0] and a path"),
    "sampling_rate": (_is_count, f"{_COUNT} of Hz"),
    "num_samples": (_is_count, f"{_COUNT} of samples"),
    "duration": (_is_seconds, _SECONDS),
}
_SUPERVISION = {
    "id": (_is_name, _NAME),
    "recording_id": (_is_name, _NAME),
    "start": (_is_seconds, _SECONDS),
    "duration": (_is_seconds, _SECONDS),
    "channel": (_is_channel, "a channel's number, or a list of them"),
    "text": (_is_text_or_none, _TEXT),
    "language": (_is_text_or_none, _TEXT),
    "speaker": (_is_text_or_none, _TEXT),
}
