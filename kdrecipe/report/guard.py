"""What is said of a teacher beside a quick baseline: on the terminal, and first in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_SHOWN = 10  # epochs of a curve
LITTLE = 0.5  # of a teacher that gets fewer characters right than wrong one can say that it has learnt little


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """A verdict of ``guard.json`` in two parts that a colon joins: the teacher, and what there is to say.

    Args:
        row: ``system``, ``seed``, ``kind``, ``learnt`` (None: no verdict, for the reason ``why``), ``cer``,
            ``baseline_cer``, ``baseline_steps``, ``curve`` (pairs: epoch, dev token error rate),
            ``max_epochs`` (``training.epochs``) and ``stopped`` (why training ended).
    """
    name = f"{row['system']}/seed{row['seed']}"
    baseline = f"a quick baseline of {row['baseline_steps']} steps {_percent(row['baseline_cer'])} %"
    rates = f"{_percent(row['cer'])} % of dev's characters wrong, {baseline}"
    if row["learnt"] is None:
        return name, f"{rates} (no verdict: {row['why']})"
    if row["learnt"]:
        return name, rates
    little = row["cer"] >= LITTLE
    lead = f"{name} {'has learnt little' if little else 'is not clearly better than a quick baseline'}"
    return lead, "; ".join(part for part in (rates, curve(row["curve"]), _remedy(row)) if part)


def curve(found: Sequence[tuple[int, float]]) -> str:
    """``dev token errors by epoch: 94 82 67 59 52 %``; of a long one about ten epochs, evenly spread."""
    if not found:
        return ""
    last = len(found) - 1
    places = sorted({round(i * last / (MAX_SHOWN - 1)) for i in range(MAX_SHOWN)})
    rates = " ".join(f"{100 * found[place][1]:.0f}" for place in places)
    if len(found) > MAX_SHOWN:
        epochs = ", ".join(str(found[place][0]) for place in places)
        return f"dev token errors after epochs {epochs}: {rates} %"
    return f"dev token errors by epoch: {rates} %"


def _remedy(row: Mapping[str, Any]) -> str:
    if row["kind"] == "pretrained":
        return "is it meant for this language and this audio?"
    other = "another training.lr or smaller batches (training.batch_duration_s)"
    if row["stopped"] == "flat":
        return f"its dev error was flat: try {other}"
    return f"train it longer (training.epochs, now {row['max_epochs']}), or with {other}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"
