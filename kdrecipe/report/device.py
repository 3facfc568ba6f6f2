"""Rows of ``bench``: as text for the terminal, and compared with each other as a table and a page.

A row is what :func:`kdrecipe.measure.device.device_row` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdrecipe.report import html, plots
from kdrecipe.report.text import Table
from kdrecipe.score.intervals import Estimate, rate

Row = Mapping[str, Any]
NONE = "–"


def _number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value: Any = row
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return NONE if value is None else f"{scale * value:,.{digits}f}"

    return show


COLUMNS: dict[str, Callable[[Row], str]] = {
    "params": _number("params", 0),
    "MB": _number("size_mb", 2),
    "MMAC/s": _number("macs_per_s", 1, 1e-6),
    "RTF, 1 thread": _number("rtf_median", 5),
    "all threads": _number("rtf_all_threads", 5),
    "p50 ms": _number("latency_s.p50", 1, 1e3),
    "p95": _number("latency_s.p95", 1, 1e3),
    "p99": _number("latency_s.p99", 1, 1e3),
    "peak MB": _number("peak_rss_mb", 0),
    "(empty)": _number("baseline_rss_mb", 0),
    "start ms": _number("load_s", 0, 1e3),
}
"""What a row costs: heading -> figure as text."""


def bench_table(rows: Sequence[Row]) -> str:
    """Rows for the terminal."""
    wers = any(row["wer"] is not None for row in rows)
    cells = [
        [row["model"], *(show(row) for show in COLUMNS.values())]
        + ([_number("wer", 2, 100)(row)] if wers else [])
        + [row["runtime"]]
        for row in rows
    ]
    return plain([["model", *COLUMNS, *(["WER %"] if wers else []), "runtime"], *cells])


def plain(cells: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first and last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    last = len(widths) - 1

    def place(i: int, cell: str) -> str:
        return cell.ljust(widths[i]) if i in (0, last) else cell.rjust(widths[i])

    return "\n".join("  ".join(place(i, c) for i, c in enumerate(line)).rstrip() for line in cells)


# ---------------------------------------------------------------- compared


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row: system and variant, with a number where they occur again."""
    found: list[str] = []
    for row in rows:
        name = f"{row['name']} {row['variant']}".strip()
        number = sum(name == label.partition(" #")[0] for label in found)
        found.append(f"{name} #{number + 1}" if number else name)
    return found


def compare_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Headings and a line per row: costs, WER with its 95 % interval, difference to the first row.

    Args:
        rows: of one test set.
    """
    estimates = [_estimate(row) for row in rows]
    shown = [name for name in COLUMNS if name not in ("p50 ms", "p99", "(empty)")]
    lines = [
        ["system", *("p95 ms" if name == "p95" else name for name in shown), "WER %", "against the first"]
    ]
    for i, (label, row, estimate) in enumerate(zip(labels(rows), rows, estimates, strict=True)):
        difference = estimate - estimates[0]
        lines.append(
            [
                label,
                *(COLUMNS[name](row) for name in shown),
                _with_interval(estimate.value, estimate.positive_interval()),
                _with_interval(difference.value, difference.interval(), sign="+") if i else NONE,
            ]
        )
    return lines


def compare_page(rows: Sequence[Row], split: str) -> str:
    """The table and WER against size and time, as one self-contained page."""
    headings, *lines = compare_cells(rows)
    names = labels(rows)
    costs = {"size_mb": _points(rows, names, "size_mb"), "rtf": _points(rows, names, "rtf_median")}
    figures = html.cost_figures(costs, split, legend=False)  # which kinds they are is not known
    table = Table(headings, lines, frozenset(range(1, len(headings))))
    first = rows[0]["errors"]
    words = sum(length for _, length in first.values())
    notes = [f"Intervals: 95 %, over utterances. The runtime of each: {'; '.join(_runtimes(rows))}."]
    parts = [html.Part("Plots", "plots", figures), html.Part("Table", "blocks", [table, *notes])]
    return html.render("Compared", f"{split}: {len(first)} utterances, {words} words", parts)


def _runtimes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row["runtime"]) for row in rows if row["runtime"]))


def _points(rows: Sequence[Row], names: Sequence[str], cost: str) -> list[plots.Point]:
    """Variants of one system are joined by a line to its first."""
    found: list[plots.Point] = []
    firsts: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        parent = firsts.setdefault(row["name"], name)
        kind = "trained" if parent == name else "compressed"
        interval = _estimate(row).positive_interval()
        found.append(plots.Point(name, kind, row["wer"], interval, row[cost], (), parent))
    return found


def _estimate(row: Row) -> Estimate:
    """The error rate with its variance over utterances."""
    counts = np.array([row["errors"][key] for key in sorted(row["errors"])], dtype=np.float64)
    # Rows of one key are paired: they are about the same utterances, and none has several seeds.
    return rate(counts[None, :, 0], counts[None, :, 1], np.arange(len(counts)), "one")


def _with_interval(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    text = f"{100 * value:{sign}.2f}"
    if interval is None:
        return text
    low, high = (f"{100 * end:{sign}.2f}" for end in interval)
    return f"{text} ({low} to {high})"
