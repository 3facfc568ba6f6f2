"""Facts about the texts of a split that move its error rates, as sentences for the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from kdrecipe.interfaces import Metric

UNKNOWN = "<unk>"  # what stands for a character without a token: its letters are no text


def text_facts(
    references: Mapping[str, str],
    hypotheses: Mapping[str, Mapping[str, str]],
    metrics: Mapping[str, Metric],
    split: str,
) -> list[str]:
    """What a reader of the split's error rates must know about its texts.

    Args:
        references: utterance id -> transcript.
        hypotheses: system -> utterance id -> recognised text.
        metrics: by name; the first is the table's.
        split: its name.
    """
    metric = next(iter(metrics.values()))
    refs, said = list(references.values()), {name: list(of.values()) for name, of in hypotheses.items()}
    notes = _empty(refs, metric, split)
    if metric.errors("three", "3")[0]:
        notes += _digits(refs, said, split)
    if metric.errors("a", "A")[0]:
        notes += _case(refs, said, split)
    everything = list(itertools.chain(*said.values()))
    for other in metrics.values():
        if hasattr(other, "notes"):
            notes += [f"{split}: {note}" for note in other.notes(refs, everything)]
    return list(dict.fromkeys(notes))


def _empty(refs: Sequence[str], metric: Metric, split: str) -> list[str]:
    empty = sum(metric.errors(ref, "")[1] == 0 for ref in refs)
    if not empty:
        return []
    are = "reference is" if empty == 1 else "references are"
    return [f"{empty} {split} {are} empty: whatever a system says there is an insertion"]


def _digits(refs: Sequence[str], said: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """Numbers in digits on one side, and none on the other, where they must be in words."""
    written = _with_digits(refs)
    others = {name: _with_digits(texts) for name, texts in said.items()}
    if not written:
        found = [f"{name} in {number}" for name, number in others.items() if number]
        sides = (
            f"no {split} reference has digits, what systems say has ({_listed(found)} of {len(refs)} texts)"
        )
    else:
        found = [name for name, number in others.items() if not number]
        sides = (
            f"{written} of {len(refs)} {split} references have digits, what {_listed(found)} says has none"
        )
    return [f"{sides}: 3 against three is an error"] if found else []


def _case(refs: Sequence[str], said: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """Capitals, small letters or both on one side, and not the same on the other."""
    mine = _cases(refs)
    theirs = {name: found for name, texts in said.items() if (found := _cases(texts)) not in ("", mine)}
    if not mine or not theirs:
        return []
    sides = _listed([f"{name} {found}" for name, found in theirs.items()])
    return [
        f"{split} references have {mine}, systems other letters ({sides}): the same word in another case is "
        "an error; lowercase: true beside the metric ignores case"
    ]


def _cases(texts: Iterable[str]) -> str:
    letters = "".join(set("".join(texts).replace(UNKNOWN, "")))
    upper, lower = any(map(str.isupper, letters)), any(map(str.islower, letters))
    return {(1, 1): "capitals and small letters", (1, 0): "capitals", (0, 1): "small letters"}.get(
        (upper, lower), ""
    )


def _with_digits(texts: Iterable[str]) -> int:
    return sum(any(c.isdecimal() for c in text) for text in texts)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
