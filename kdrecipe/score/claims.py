"""Published figures beside those measured here.

A figure is judged only if it can be compared: one on another corpus gets a note that says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_RATIOS = {"params_ratio": ("params", "parameters"), "size_ratio": ("size_mb", "size in MB")}


def beside(
    claims: Sequence[Mapping[str, Any]], systems: Sequence[Mapping[str, Any]], corpus: str
) -> list[dict[str, Any]]:
    """Every claim with the figure that was measured.

    Args:
        claims: fields of :class:`kdrecipe.recipe.sections.Claim`.
        systems: rows of ``results.json``; the first split of the first is the default one.
        corpus: the corpus that they were measured on.

    Returns:
        The claims with ``measured``, ``ci95`` (in the unit of ``value``, None if there is no
        interval), ``measured_on`` (corpus and split) and ``note``.
    """
    rows = {system["name"]: system for system in systems}
    return [{**claim, **_beside(claim, rows, corpus)} for claim in claims]


def _beside(claim: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], corpus: str) -> dict[str, Any]:
    if claim["system"] is None:
        return _not_measured("nothing here measures it")
    for name in (claim["system"], claim["of"]):
        if name is not None and name not in rows:
            return _not_measured(f"there is no system {name} here")
    if claim["figure"] == "wer":
        return _wer(claim, rows[claim["system"]], corpus)
    key, what = _RATIOS[claim["figure"]]
    over, under = rows[claim["system"]].get(key), rows[claim["of"]].get(key)
    if over is None or not under:
        return _not_measured(f"the {what} of {claim['system']} or {claim['of']} is not known")
    return {"measured": round(over / under, 6), "ci95": None, "measured_on": None, "note": ""}


def _not_measured(why: str) -> dict[str, Any]:
    return {"measured": None, "ci95": None, "measured_on": None, "note": f"not measured: {why}"}


def _wer(claim: Mapping[str, Any], system: Mapping[str, Any], corpus: str) -> dict[str, Any]:
    split = claim["split"] or next(iter(system["splits"]), None)
    rate = (system["splits"].get(split) or {}).get("wer")
    if not rate:
        return _not_measured(f"{split or 'no split'} is not decoded here")
    ci95 = [round(100 * end, 4) for end in rate["ci95"]] if rate.get("ci95") else None
    here = f"{corpus} {split}".strip()
    found = {"measured": round(100 * rate["mean"], 4), "ci95": ci95, "measured_on": here}
    if claim["on"] and not same_test_set(claim["on"], corpus, str(split)):
        return {**found, "note": "measured on another test set than claimed: not to be compared"}
    return {**found, "note": _verdict(claim["value"], ci95)}


def _verdict(claimed: float, ci95: Sequence[float] | None) -> str:
    """Where the claimed rate lies; empty without an interval."""
    if ci95 is None:
        return ""
    if ci95[0] <= claimed <= ci95[1]:
        return "the claim lies within the interval"
    return "measured lower than claimed" if claimed > ci95[1] else "measured higher than claimed"


def same_test_set(claimed_on: str, corpus: str, split: str) -> bool:
    """Whether ``LibriSpeech test-clean`` is the split ``test_clean`` of the corpus ``librispeech``."""
    return _words(claimed_on) == _words(f"{corpus} {split}")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def claimed_text(claim: Mapping[str, Any]) -> str:
    """``6.5 % WER on LibriSpeech test-clean``, ``0.25 of teacher's parameters``; empty without a value."""
    if claim["value"] is None:
        return ""
    on = f" on {claim['on']}" if claim["on"] else ""
    return f"{_figure(claim, claim['value'])}{on}"


def measured_text(claim: Mapping[str, Any]) -> str:
    """The same for the measured figure, with its interval; empty if nothing was measured."""
    if claim["measured"] is None:
        return ""
    interval = " ({:.2f} to {:.2f})".format(*claim["ci95"]) if claim["ci95"] else ""
    on = f" on {claim['measured_on']}" if claim["measured_on"] else ""
    if claim["figure"] == "wer":
        return f"{claim['measured']:.2f} % WER{interval}{on}"
    return f"{_figure(claim, claim['measured'])}{on}"


def _figure(claim: Mapping[str, Any], value: float) -> str:
    if claim["figure"] == "wer":
        return f"{value:g} % WER"
    of = f" of {claim['of']}'s" if claim["of"] else " of the"
    return f"{value:.3g}{of} {_RATIOS[claim['figure']][1]}"
