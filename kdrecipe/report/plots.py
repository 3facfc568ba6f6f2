"""Plots for the report, as SVG to be set into a page.

Colours are names, not values: the page's style sheet says what ``--ink``, ``--muted``, ``--grid``,
``--paper`` and ``--c1`` ... ``--c8`` are, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLOURS = 8
KIND_COLOURS = {"trained": 1, "pretrained": 8, "distilled": 2, "compressed": 3}
KIND_MARKERS = {"trained": "o", "pretrained": "D", "distilled": "s", "compressed": "^"}

# stand-ins that no drawing needs, replaced by variables in the finished SVG
_INK, _MUTED, _GRID, _PAPER = "#fe0001", "#fe0002", "#fe0003", "#fe0004"
_STAND_INS = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _PAPER: "paper"} | {
    f"#fd000{i}": f"c{i}" for i in range(1, NUM_COLOURS + 1)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdrecipe",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
}
_DASHES = ["-", (0, (4, 2)), (0, (1, 1.5))]
_WIDTH = 6.4  # inches of 72 units
_FAMILY = re.compile(r"(font: [^;\"]*?)'[^;\"]*|font-family: [^;\"]*")


@dataclass(frozen=True)
class Point:
    """One system in a plot; rates are fractions, ``seeds`` those of single seeds, ``cost`` size or time."""

    name: str
    kind: str
    rate: float
    ci95: Sequence[float] | None = None
    cost: float | None = None
    seeds: Sequence[float] = ()
    parent: str | None = None


def colour_of(index: int) -> str:
    """CSS variable of the ``index``-th line of a plot."""
    return f"--c{index % NUM_COLOURS + 1}"


def _colour(number: int) -> str:
    return f"#fd000{number}"


def cost_plot(points: Sequence[Point], label: str, prefix: str) -> str:
    """Error rate against a cost (log), with the Pareto front, and lines from compressed systems to parents.

    Args:
        points: systems with a cost above 0.
        label: of the costs, for the axis: ``size, MB``.
        prefix: makes ids unique in the page.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.3)
        place = {p.name: (float(p.cost or 0), 100 * p.rate) for p in points}
        lines = []
        best = front(points)
        if len(best) > 1:
            axes.plot(
                *zip(*[place[p.name] for p in best], strict=True),
                color=_GRID, linewidth=5, drawstyle="steps-post", zorder=1,
            )  # fmt: skip
        for p in points:
            x, y = place[p.name]
            if p.kind == "compressed" and p.parent in place:
                lines.append((place[p.parent], (x, y)))
                axes.plot(
                    *zip(*lines[-1], strict=True), color=_MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=2
                )
            colour = _colour(KIND_COLOURS.get(p.kind, NUM_COLOURS))
            if p.ci95:
                lines.append(((x, 100 * p.ci95[0]), (x, 100 * p.ci95[1])))
                axes.plot(*zip(*lines[-1], strict=True), color=colour, linewidth=1.6, alpha=0.55, zorder=3)
            marker = KIND_MARKERS.get(p.kind, "o")
            axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor=_PAPER, zorder=4)
        _log_axis(axes, [x for x, _ in place.values()])
        axes.set_xlabel(f"{label} (log)")
        axes.set_ylabel("WER, %")
        ends = [100 * e for p in points for e in (p.ci95 or [p.rate, p.rate])]
        spare = 0.12 * (max(ends) - min(ends)) or 1.0
        axes.set_ylim(max(0.0, min(ends) - spare), max(ends) + spare)
        figure.draw_without_rendering()  # the layout moves the axes: pixels are known only now
        _label_points(axes, place, lines)
        return _svg(figure, f"Word error rate against {label}", prefix)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front by cost: those that no other point equals or beats in both rate and cost."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.cost or 0, p.rate)):
        if not found or p.rate < found[-1].rate:
            found.append(p)
    return found


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with room around the values."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.16, 1.35)
    axes.set_xlim(low / margin, high * margin)
    ticks = _log_ticks(low / margin, high * margin)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within the range; fewer where those are many."""
    steps = [m * 10.0**k for k in range(-6, 7) for m in (1, 2, 5)]
    ticks = [t for t in steps if low <= t <= high]
    return ticks if len(ticks) <= 7 else [t for t in ticks if f"{t:e}"[0] == "1"]


Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


def _label_points(axes: Axes, place: Mapping[str, Place], lines: Sequence[tuple[Place, Place]]) -> None:
    """Write names beside points where they cover neither points, lines nor each other."""

    def pixel(x: float, y: float) -> Place:
        found = axes.transData.transform((x, y))
        return float(found[0]), float(found[1])

    taken: list[Box] = []
    for px, py in (pixel(x, y) for x, y in place.values()):
        taken.append((px - 6, py - 6, px + 6, py + 6))
    for start, end in lines:
        (x0, y0), (x1, y1) = pixel(*start), pixel(*end)
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / 4))
        for i in range(steps + 1):
            px, py = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            taken.append((px - 2, py - 2, px + 2, py + 2))
    frame = axes.bbox
    for name, (x, y) in place.items():
        px, py = pixel(x, y)
        width, height = 6.3 * len(name) + 4, 13.0
        spots = [(px + 9 + dx, py + dy - height / 2, "left") for dy in (0, 13, -13) for dx in (0, 8)]
        spots += [(px - 9 - width, py + dy - height / 2, "right") for dy in (0, 13, -13)]
        spots += [(px - width / 2, py + dy - height / 2, "center") for dy in (20, -20, 32, -32, 44, -44)]

        def cost(spot: tuple[float, float, str], width: float = width, height: float = height) -> float:
            left, bottom, _ = spot
            hits = [
                max(0.0, min(left + width, x1) - max(left, x0))
                * max(0.0, min(bottom + height, y1) - max(bottom, y0))
                for x0, y0, x1, y1 in taken
            ]
            outside = max(0.0, frame.x0 - left) + max(0.0, left + width - frame.x1 - 12)
            outside += max(0.0, frame.y0 - bottom) + max(0.0, bottom + height - frame.y1 - 8)
            return float(sum(hits) + 20 * outside)

        left, bottom, align = min(spots, key=cost)  # the first of equals: nearest to the point
        taken.append((left, bottom, left + width, bottom + height))
        anchor = {"left": left, "right": left + width, "center": left + width / 2}[align]
        offset = (anchor - px, bottom + height / 2 - py)
        axes.annotate(
            name, (x, y), offset, textcoords="offset points", ha=align, va="center", fontsize=10, zorder=5
        )


def rate_bars(points: Sequence[Point], prefix: str) -> str:
    """Error rates as bars, with intervals, and single seeds as dots."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(max(4.35, 0.36 * len(points) + 0.75))
        axes.grid(axis="y", visible=False)
        ends = [max([p.rate, *(p.ci95 or []), *p.seeds]) for p in points]
        limit = 100 * max(ends) * 1.16 or 1.0
        for i, (p, end) in enumerate(zip(points, ends, strict=True)):
            colour = _colour(KIND_COLOURS.get(p.kind, NUM_COLOURS))
            axes.barh(i, 100 * p.rate, height=0.6, color=colour, alpha=0.75, zorder=2)
            if p.ci95:
                axes.plot([100 * e for e in p.ci95], [i, i], color=_INK, linewidth=1.8, zorder=3)
            if len(p.seeds) > 1:
                dots = [100 * rate for rate in p.seeds]
                axes.plot(
                    dots, [i] * len(dots), "o", markersize=4, color=_PAPER, markeredgecolor=_INK, zorder=4
                )
            axes.text(100 * end + 0.015 * limit, i, f"{100 * p.rate:.2f}", va="center", fontsize=10, zorder=5)
        axes.set_yticks(range(len(points)), [p.name for p in points])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(max(len(points), 6) - 0.4, -0.6)  # few bars stay slim
        axes.set_xlim(0, limit)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("WER, %")
        return _svg(figure, "Word error rate of every system", prefix)


def curves(lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], ylabel: str, prefix: str) -> str:
    """Curves over epochs: one colour per name, one line per seed, the mean over seeds thicker.

    Args:
        lines: name -> for each seed its (epoch, value) points.
        ylabel: what is plotted.
        prefix: makes ids unique in the page.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.9)
        values = [y for seeds in lines.values() for points in seeds for _, y in points]
        for i, seeds in enumerate(lines.values()):
            look: dict[str, Any] = {
                "color": _colour(i % NUM_COLOURS + 1),
                "linestyle": _DASHES[i // NUM_COLOURS % 3],
            }
            at: dict[float, list[float]] = {}
            for points in seeds:
                for x, y in points:
                    at.setdefault(x, []).append(y)
                if len(seeds) > 1:
                    axes.plot(*zip(*points, strict=True), linewidth=0.9, alpha=0.4, **look)
            mean = sorted((x, sum(ys) / len(ys)) for x, ys in at.items() if len(ys) == len(seeds))
            if mean:
                axes.plot(
                    *zip(*mean, strict=True), linewidth=1.9, marker="o" if len(mean) == 1 else None, **look
                )
        axes.set_ylim(min(0.0, *values), 1.05 * max(values) or 1.0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, f"{ylabel} over epochs", prefix)


def layers(
    names: Sequence[str], values: Mapping[str, Sequence[float | None]], label: str, prefix: str
) -> str:
    """A line per layer, from the first at the top, with a mark for each kind of change; values on a log axis.

    Args:
        names: of the layers.
        values: change -> a value per layer; None and 0 have no mark.
        label: of the values.
        prefix: makes ids unique in the page.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.17 * len(names) + 1.2)
        for i, (listed, marker) in enumerate(zip(values.values(), "os^", strict=False)):
            marks = [(value, y) for y, value in enumerate(listed) if value]
            if marks:
                look: Any = {"color": _colour(i + 1), "markersize": 5, "markeredgecolor": _PAPER}
                axes.plot(*zip(*marks, strict=True), marker, markeredgewidth=0.5, zorder=3 + i, **look)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(f"{label} (log)")
        return _svg(figure, f"{label} of every layer", prefix)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", dpi=72)  # one unit is one pixel
    return figure, figure.add_subplot()


def _svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an element for HTML: no namespaces, own ids, colours by variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = _bare(text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    text = _FAMILY.sub(lambda m: f"{m[1]}var(--font)" if m[1] else "font-family: var(--font)", text)
    for stand_in, name in _STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _bare(text: str) -> str:
    """Without size and namespaces, which HTML needs not."""
    head, body = text.split(">", 1)
    return re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + ">" + body
