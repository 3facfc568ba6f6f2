"""The generated tables of ``which-loss.md``: what each loss gained, from committed results of three recipes.

Filled in by ``fill_readme.py``. Where a recipe has not been run yet, its block says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    "losses": "voice_commands/losses",
    "pairs": "voice_commands/pairs",
    "real-speech": "mini_librispeech/losses",
}
COSTS = ROOT / "benchmarks" / "README.md"
NONE = "–"
Row = Mapping[str, Any]


def table(recipe: str, recipes: Path = ROOT / "recipes", costs: Path = COSTS) -> str:
    """The rows of a recipe by their error rate, or what would make them."""
    directory = recipes / recipe
    if not (directory / "results.json").exists():
        return f"Not run yet: `kdrecipe run {recipe}` makes this table."
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    ratios = step_times(costs.read_text(encoding="utf-8"))
    split = next(iter(results["splits"]))
    systems = sorted(results["systems"], key=lambda s: float(s["splits"][split]["wer"]["mean"]))
    asked = [c for c in results["comparisons"] if c["split"] == split]
    against = {c["a"]: c for c in reversed(asked)}  # the first of several
    head = ["system", "losses", "WER %", "gap recovered %", "against", "points (95 % interval)", "p (Holm)"]
    lines = [f"| {' | '.join([*head, 'step'])} |", "|---|---|--:|--:|---|--:|--:|--:|"]
    lines += [_row(system, split, against.get(system["name"]), ratios) for system in systems]
    seeds = max(len(system["seeds"]) for system in results["systems"])
    facts = results["splits"][split]
    made = (
        f"{facts['utterances']} test utterances by {facts['speakers']} speakers, up to {seeds} seeds, "
        f"{results['recipe']['date']}: [all of it](../recipes/{recipe}/RESULTS.md)"
    )
    chosen = directory / "TRIALS.md"
    trials = f", [how options were chosen](../recipes/{recipe}/TRIALS.md)" if chosen.exists() else ""
    return "\n".join([*lines, "", f"{made}{trials}.", *_verdicts(results, split)])


def step_times(page: str) -> dict[str, float]:
    """Loss -> a step with it over one without, from the table as it was printed."""
    rows = re.findall(
        r"^\| `(\w+)` \| [\d.]+ \([\d.]+\) \| [\d.]+ \([\d.]+\) \| ([\d.]+) \|$", page, re.MULTILINE
    )
    return {name: float(ratio) for name, ratio in rows}


def _row(system: Row, split: str, found: Row | None, ratios: Mapping[str, float]) -> str:
    scores = system["splits"][split]
    wer, gap = scores["wer"], scores.get("gap_recovered")
    names = [term["name"] for term in system.get("losses") or ()]
    extra = [ratios[name] - 1 for name in names if name in ratios]
    cells = [
        f"`{system['name']}`",
        " + ".join(f"`{name}`" for name in names) or NONE,
        _percent(wer["mean"]) + (f" ± {_percent(wer['std'])}" if wer.get("std") is not None else ""),
        f"{100 * gap['mean']:.0f}" + (f" ({_span(gap['ci95'], 0)})" if gap["ci95"] else "") if gap else NONE,
        f"`{found['b']}`" if found else NONE,
        f"{_points(found['difference'])} ({_span(found['ci95'])})" if found and found["ci95"] else NONE,
        _p(found["p_adjusted"]) if found else NONE,
        f"× {1 + sum(extra):.2f}" if extra else NONE,
    ]
    return f"| {' | '.join(cells)} |"


def _verdicts(results: Row, split: str) -> Iterator[str]:
    """Which systems beat the one they were compared with, and which did worse."""
    better, worse = [], []
    for found in results["comparisons"]:
        if found["split"] == split and found["ci95"] and found["p_adjusted"] < 0.05:
            low, high = found["ci95"]
            place = better if high < 0 else worse if low > 0 else None
            if place is not None:
                place.append(f"`{found['a']}` ({_points(found['difference'])} against `{found['b']}`)")
    yield ""
    yield f"Better, p (Holm) below 0.05: {', '.join(better) or 'none'}."
    yield f"Worse: {', '.join(worse) or 'none'}. Of all others, no difference is shown."


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def _span(ends: tuple[float, float], digits: int = 2) -> str:
    return " to ".join(f"{100 * end:.{digits}f}".replace("-", "−") for end in ends)


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


BLOCKS: dict[str, Callable[[], str]] = {
    name: (lambda recipe=recipe: table(recipe))  # type: ignore[misc]
    for name, recipe in RECIPES.items()
}
