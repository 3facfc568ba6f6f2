"""What the figures say, in plain words: all sentences and verdicts are computed from the figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdrecipe.report.guard import verdict as teacher_verdict
from kdrecipe.score.intervals import MIN_SEEDS
from kdrecipe.text import read_lines

SIGNIFICANT = 0.05
# Of real-time factors: models of one shape, timed one after the other, were up to 1.37 apart.
CLEARLY_FASTER = 1.5
NONE = "–"  # a figure that was not measured

Verdict = Literal["better", "worse", "same", "fact", "caution"]
System = Mapping[str, Any]


# ---------------------------------------------------------------- figures as text


def percent(rate: float | None) -> str:
    """A fraction as a percentage: 0.2453 -> ``24.53``."""
    return NONE if rate is None else f"{100 * rate:.2f}"


def span(pair: Sequence[float] | None) -> str:
    """An interval of fractions in percent: ``22.91 to 26.20``."""
    return NONE if pair is None else f"{percent(pair[0])} to {percent(pair[1])}"


def spread(rate: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds in percent: ``24.53 ± 0.41``."""
    if not rate:
        return NONE
    text = percent(rate.get("mean"))
    return text if rate.get("std") is None else f"{text} ± {percent(rate['std'])}"


def count(number: float | None) -> str:
    """A number of things: ``812``, ``14.2 k``, ``23.3 M``."""
    if number is None:
        return NONE
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def figure(number: float | None, digits: int = 3) -> str:
    """A measured number with that many significant digits, or a whole one as it is."""
    if number is None:
        return NONE
    if isinstance(number, int) or abs(number) >= 10**digits:
        return f"{number:.0f}"
    return f"{number:#.{digits}g}".rstrip(".")


def p_value(p: float | None) -> str:
    """``0.034``, or ``< 0.001``."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _p_phrase(p: float) -> str:
    text = p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def duration(seconds: float | None) -> str:
    """``48 s``, ``12 min``, ``3.4 h``."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def first_parent(system: System) -> str | None:
    """The parent, or the first of several."""
    parent = system["parent"]
    return parent if isinstance(parent, str) or not parent else str(parent[0])


def rtf(system: System) -> float | None:
    """Median real-time factor."""
    value = system["rtf"]
    median = value.get("median") if isinstance(value, Mapping) else value
    return None if median is None else float(median)


# ---------------------------------------------------------------- logs of training


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log, without incomplete lines; a missing file has none."""
    if not path.is_file():
        return []
    rows = []
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


# ---------------------------------------------------------------- the reading


def reading(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The sentences that follow from the figures: a list of ``{"verdict", "text"}``."""
    systems = {s["name"]: s for s in results["systems"]}
    few = [name for name, system in systems.items() if few_seeds(system)]
    said: list[tuple[Verdict, str]] = _little_learnt(results.get("guard", []))
    said += [_compared(c, few) for c in results["comparisons"]]
    for system in systems.values():
        said += _recovered(system)
        said += _shrunk(system, systems)
    said += _searched(results["searches"])
    said += _cautions(results, few)
    return [{"verdict": verdict, "text": text} for verdict, text in said]


def few_seeds(system: System) -> bool:
    """Whether its intervals leave out the variance between seeds; a pretrained model has no seeds."""
    return system["kind"] != "pretrained" and 0 < len(system["seeds"]) < MIN_SEEDS


def seeds_won(c: Mapping[str, Any]) -> tuple[int, int, int]:
    """The number of seeds (or pairs of seeds) that a comparison's first system wins, loses, and of all."""
    won, lost, number = c.get("seeds_won") or c.get("seed_pairs") or (0, 0, 0)
    return won, lost, number


def _little_learnt(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Verdict, str]]:
    """Teachers that are not clearly better than a quick baseline, on which all that they taught depends."""
    failed = [teacher_verdict(row) for row in rows if row["learnt"] is False]
    return [("caution", f"**{lead}**: {rest}{'' if rest.endswith('?') else '.'}") for lead, rest in failed]


def _compared(found: Mapping[str, Any], few: Sequence[str]) -> tuple[Verdict, str]:
    """One comparison as a sentence; ``few``: systems with fewer than three seeds."""
    a, b, metric = found["a"], found["b"], str(found.get("metric", "wer")).upper()
    p = found["p"] if found.get("p_adjusted") is None else found["p_adjusted"]
    change = f"on {found['split']}: {percent(found['b_mean'])} → {percent(found['a_mean'])} % {metric}"
    if p >= SIGNIFICANT:
        text = f"**No difference shown between {a} and {b}** {change}, {_p_phrase(p)}"
        return "same", f"{text}{_still_possible(found)}."
    better = found["difference"] < 0
    word, more = ("better", "fewer") if better else ("worse", "more")
    if found["b_mean"]:
        change += f", {100 * abs(found['difference']) / found['b_mean']:.0f} % {more} errors"
    text = f"**{a} is {word} than {b}** {change}, {_p_phrase(p)}."
    won, lost, number = seeds_won(found)
    agree = won if better else lost
    share = f"{agree} of {number}" + (" pairs" if found.get("seed_pairs") else "")
    if number > 1 and agree == number:
        text += f" Every seed agrees ({share})."
    elif number > 1:
        text += f" Seeds disagree: it holds in {share}, so training again may reverse it."
    if lacking := [name for name in (a, b) if name in few]:
        text += f" That is about these models: fewer than three seeds of {_listed(lacking)}."
    return ("better" if better else "worse"), text


def _still_possible(found: Mapping[str, Any]) -> str:
    """What a comparison that shows no difference leaves open."""
    ends, p = found.get("ci95"), found["p"]
    if not ends:
        return ""
    if not any(ends):
        return "; the two make equally many errors throughout"
    if p < SIGNIFICANT:
        alone = f"alone, this comparison has {_p_phrase(p)} and {points(ends)} points"
        return f" after correction for the number of comparisons; {alone}"
    return f"; anything from {points(ends)} points is possible"


def points(pair: Sequence[float]) -> str:
    """An interval of differences in percentage points: ``−2.49 to +1.35``."""
    return f"{100 * pair[0]:+.2f} to {100 * pair[1]:+.2f}".replace("-", "−")


def _recovered(system: System) -> list[tuple[Verdict, str]]:
    """How much of the gap between its baseline and its teacher a student closes."""
    said: list[tuple[Verdict, str]] = []
    for split, scores in system["splits"].items():
        if "gap_recovered" not in scores:
            continue
        gap, name = scores["gap_recovered"], system["name"]
        if gap is None:
            text = f"{name} has no gap to recover on {split}: its teacher is no better than its baseline."
            said.append(("caution", text))
            continue
        part = f"{name} recovers {100 * gap['mean']:.0f} % of the gap"
        text = f"{part} between {gap['baseline']} and {gap['teacher']} on {split}"
        if gap.get("ci95"):
            text += " (95 % interval {:.0f} to {:.0f} %).".format(*(100 * end for end in gap["ci95"]))
        else:
            text += "; the gap is too small for an interval."
        said.append(("fact", text))
    return said


def _shrunk(system: System, systems: Mapping[str, System]) -> list[tuple[Verdict, str]]:
    """Size and speed of a compressed system, compared with its parent."""
    parent = systems.get(first_parent(system) or "")
    if system["kind"] != "compressed" or parent is None or not (system["size_mb"] and parent["size_mb"]):
        return []
    sizes = [f"{s['name']} takes {figure(s['size_mb'])} MB" for s in (system, parent)]
    text = " where ".join(sizes)
    new, old = rtf(system), rtf(parent)
    if new and old:
        speed = figure(old / new, 2)
        if max(old / new, new / old) < CLEARLY_FASTER:
            text += "; their speeds differ by no more than two runs of the same model may"
        elif old > new:
            text += f" and is {speed} times as fast"
        else:
            text += f", and is slower: {speed} times the speed"
    return [("fact", text + ".")]


def _searched(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Verdict, str]]:
    """Searches that differ significantly; one sentence for all systems in which they do."""
    rtfs = {(row["system"], row["search"]): row["rtf"] for row in rows}
    groups: dict[tuple[str, str, str, bool], list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows:
        for c in row["comparisons"]:
            p = c["p"] if c.get("p_adjusted") is None else c["p_adjusted"]
            if p < SIGNIFICANT:
                key = (c["a"], c["b"], c["split"], c["difference"] < 0)
                groups.setdefault(key, []).append((row["system"], {**c, "p": p}))
    said: list[tuple[Verdict, str]] = []
    timed: set[tuple[str, str]] = set()  # time is measured on one split only
    for (a, b, split, better), found in groups.items():
        changes = "; ".join(_search_change(system, c, better) for system, c in found)
        word = "better" if better else "worse"
        text = f"**Search by {a} is {word} than by {b}** on {split}: {changes}."
        ratios = [
            rtfs[system, a] / rtfs[system, b] for system, _ in found if rtfs[system, a] and rtfs[system, b]
        ]
        time = "" if (a, b) in timed else _time_taken(ratios)
        timed.add((a, b))
        said.append(("better" if better else "worse", text + time))
    return said


def _search_change(system: str, c: Mapping[str, Any], better: bool) -> str:
    """The change that another search makes for one system."""
    metric = str(c.get("metric", "wer")).upper()
    text = f"{system} {percent(c['b_mean'])} → {percent(c['a_mean'])} % {metric}, {_p_phrase(c['p'])}"
    won, lost, seeds = seeds_won(c)
    agree = won if better else lost
    return text if agree == seeds else f"{text}, in {agree} of {seeds} seeds"


def _time_taken(ratios: Sequence[float]) -> str:
    """How many times as long that takes, if it clearly differs for every system."""
    if not ratios or min(max(r, 1 / r) for r in ratios) < CLEARLY_FASTER:
        return ""
    low, high = figure(min(ratios), 2), figure(max(ratios), 2)
    return f" It takes {low if low == high else f'{low} to {high}'} times as long in torch."


def _cautions(results: Mapping[str, Any], few: Sequence[str]) -> list[tuple[Verdict, str]]:
    """What a reader must know before trusting the table."""
    said: list[str] = []
    if unfinished := [text for system in results["systems"] if (text := _unfinished(system))]:
        said.append(
            f"**Stopped by training.epochs while still improving**: {_listed(unfinished)}. "
            "More epochs may improve these rows."
        )
    trained = [s for s in results["systems"] if s["kind"] != "pretrained"]
    if few:
        said.append(
            f"Fewer than three seeds of {_listed(few)}: "
            "intervals and p-values leave out how far another seed would move these figures."
        )
    untimed: dict[tuple[str, str], list[str]] = {}
    for system in results["systems"]:
        if (search := system.get("search")) and search["runs_in"] == "torch" and "why" in search:
            untimed.setdefault((search["label"], search["why"]), []).append(system["name"])
    said += [
        f"{_listed(names)}: what the bundle says in torch by {label}, without a time, since {why}."
        for (label, why), names in untimed.items()
    ]
    distilled = [s for s in trained if s["kind"] == "distilled" and s["splits"]]
    tested = {name for c in results["comparisons"] for name in (c["a"], c["b"])}
    if untested := [s["name"] for s in distilled if s["name"] not in tested]:
        said.append(f"Not tested against any other system: {_listed(untested)}.")
    measured = {s["name"] for s in distilled if any("gap_recovered" in x for x in s["splits"].values())}
    if alone := [s["name"] for s in distilled if s["name"] not in measured]:
        said.append(f"No baseline of the same model and data, without a teacher, beside {_listed(alone)}.")
    said += _other_code(results["systems"])
    said += [f"{note}." for facts in results["splits"].values() for note in facts.get("notes") or ()]
    return [("caution", text) for text in said]


def _unfinished(system: System) -> str | None:
    """The system, if training ended before the dev error was flat; of several seeds, with how many."""
    runs = (system["train"] or {}).get("by_seed", [])
    number = sum(run.get("stopped") == "bound" for run in runs)
    if not number:
        return None
    return str(system["name"]) if number == len(runs) else f"{system['name']} ({number} of {len(runs)} seeds)"


def _other_code(systems: Sequence[System]) -> list[str]:
    """Rows that were made by another version of kdrecipe's code than most rows."""
    cores = {s["name"]: tuple(s["core"]) for s in systems if s.get("core")}
    if len(set(cores.values())) < 2:
        return []
    usual = Counter(cores.values()).most_common(1)[0][0]
    others = [name for name, core in cores.items() if core != usual]
    return [
        f"Made by another version of kdrecipe's code than the other rows: {_listed(others)}. "
        "To compare like with like, run their stages again with --force."
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
