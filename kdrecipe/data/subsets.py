"""Named parts of the training split, chosen by rule and the same on every machine.

A rule is a mapping with one key: ``{speakers: n}``, ``{utterances: n}``, ``{hours: x}``,
``{fraction: x}`` (of the utterances) or ``{except: name}`` (what another subset leaves over).
Subsets of one kind are nested: 5 speakers are among the 10 that the same seed gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lhotse.cut import MonoCut

from kdrecipe.errors import DataError

RULES = ("speakers", "utterances", "hours", "fraction", "except")


def choose_subsets(
    cuts: Sequence[MonoCut], rules: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, list[str]]:
    """Subset name -> ids of its cuts, in the order of ``cuts``.

    Args:
        cuts: the training cuts, without perturbed copies.
        rules: see the module's text.
        seed: which speakers or utterances.

    Raises:
        DataError: a rule is malformed, asks for more than there is, or refers in a circle.
    """
    chosen: dict[str, set[str]] = {}
    waiting = dict(rules)
    while waiting:
        ready = [n for n, rule in waiting.items() if rule.get("except", n) in chosen or "except" not in rule]
        if not ready:
            raise DataError(
                f"subsets that refer to no subset, or to each other: {', '.join(waiting)}",
                where="corpus.subsets",
                remedy="`except` names another subset of the same list",
            )
        for name in ready:
            chosen[name] = _choose(cuts, name, waiting.pop(name), chosen, seed)
    return {name: [c.id for c in cuts if c.id in chosen[name]] for name in rules}


def _choose(
    cuts: Sequence[MonoCut], name: str, rule: Mapping[str, Any], chosen: Mapping[str, set[str]], seed: int
) -> set[str]:
    where = f"corpus.subsets.{name}"
    if len(rule) != 1 or next(iter(rule)) not in RULES:
        raise DataError(f"not a rule: {dict(rule)}", where=where, remedy=f"one of {', '.join(RULES)}")
    kind, amount = next(iter(rule.items()))
    if kind == "except":
        return {c.id for c in cuts} - chosen[amount]
    rng = np.random.default_rng([seed, 0x5B5E7])
    if kind == "speakers":
        names = sorted({_speaker(c) for c in cuts})
        _enough(int(amount), len(names), "speakers", where)
        speakers = {names[i] for i in rng.permutation(len(names))[: int(amount)]}
        return {c.id for c in cuts if _speaker(c) in speakers}
    # Sorted, so that the choice does not hang on the order of the manifest.
    shuffled = [sorted(cuts, key=lambda c: c.id)[i] for i in rng.permutation(len(cuts))]
    if kind == "hours":
        ends_h = np.cumsum([c.duration for c in shuffled]) / 3600
        _enough(float(amount), float(ends_h[-1]) if len(ends_h) else 0.0, "hours", where)
        return {c.id for c in shuffled[: int(np.searchsorted(ends_h, float(amount))) + 1]}
    count = int(amount) if kind == "utterances" else round(float(amount) * len(cuts))
    _enough(count, len(cuts), "utterances", where)
    return {c.id for c in shuffled[:count]}


def _enough(wanted: float, present: float, unit: str, where: str) -> None:
    if not 0 < wanted <= present:
        raise DataError(
            f"asks for {wanted:g} {unit}, the training split has {present:g}",
            where=where,
            remedy=f"ask for more than 0 and at most {present:g}",
        )


def _speaker(cut: MonoCut) -> str:
    return str(cut.supervisions[0].speaker)
