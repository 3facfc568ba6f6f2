"""The report as one self-contained page: style, script, plots and audio are inside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kdrecipe.report import plots
from kdrecipe.report.listen import Audio, Listening, select
from kdrecipe.report.reading import first_parent, read_log, rtf
from kdrecipe.report.text import Block, Code, Table, sections, split_names

_TEMPLATES = Path(__file__).parent / "templates"
_VERDICTS = {"better": "▲", "worse": "▼", "same": "=", "fact": "•", "caution": "!"}
_BEFORE_PLOTS = ("Claims", "Systems", "Searches", "Comparisons")
COSTS = {"size_mb": ("size", "size, MB"), "rtf": ("time", "real-time factor on one thread")}
"""Costs that error rates are plotted against: key -> what it is, its axis."""
DEV_RATE, DEV_LOSS, TRAIN_LOSS = "dev_ter", "dev_loss", "loss"  # keys in log.jsonl


def page(
    results: Mapping[str, Any],
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    logs: Mapping[str, Mapping[int, Path]],
    *,
    audio: Audio | None,
    listening: Listening,
) -> str:
    """The whole page; arguments as for :func:`kdrecipe.report.write.write_report`."""
    reading, *rest, made = sections(results)
    first = [s for s in rest if s.title.startswith(_BEFORE_PLOTS)]
    items = [{**item, "mark": _VERDICTS[item["verdict"]]} for item in results["reading"]]
    listen = select(results["systems"], hyps, audio, listening)
    parts = [
        Part(reading.title, "reading", items) if items else Part(reading.title, "blocks", reading.blocks),
        *(Part(s.title, "blocks", s.blocks) for s in first),
        Part("Plots", "plots", _plots(results, logs)),
        Part("Where they differ", "listen", listen),
        *(Part(s.title, "blocks", s.blocks) for s in rest if s not in first),
        *(Part(x["title"], "blocks", from_markdown(x["markdown"])) for x in results["sections"]),
        Part(made.title, "blocks", made.blocks),
    ]
    return render(str(results["recipe"]["name"]), results["subtitle"], parts)


def render(name: str, subtitle: str, parts: Sequence[Part]) -> str:
    """A page of the report's look: its title, a line under it, and parts."""
    template = _environment().get_template("page.html")
    return template.render(
        name=name, subtitle=subtitle, parts=parts, style=_asset("report.css"), script=_asset("report.js")
    )


@dataclass(frozen=True)
class Part:
    """A heading of the page and its content, for the macro ``kind`` of ``parts.html``."""

    title: str
    kind: str
    content: Any


@dataclass(frozen=True)
class Heading:
    """A heading within a part."""

    text: str


def _asset(name: str) -> Markup:
    """A style sheet or a script of the page."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    """The templates; all text is escaped unless it is marked as HTML."""
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _inline
    for kind in (Table, Code, Heading):
        environment.tests[kind.__name__.lower()] = lambda block, kind=kind: isinstance(block, kind)
    return environment


def _inline(text: str) -> Markup:
    """Escaped, then ``**bold**`` and `` `code` ``."""
    html = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(escape(text)))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))


# ---------------------------------------------------------------- plots


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its style, and the plot's mark; without a mark, a piece of line."""

    name: str
    style: str
    mark: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot with its caption and legend."""

    caption: str
    keys: Sequence[Key]
    svg: Markup


def _plots(results: Mapping[str, Any], logs: Mapping[str, Mapping[int, Path]]) -> list[Figure]:
    """Error against size and time, bars for every split, learning curves."""
    figures = []
    for i, split in enumerate(split_names(results)):
        points = _points(results, split, "size_mb")
        by_cost = {key: _points(results, split, key) for key in COSTS} if i == 0 else {}
        costs = cost_figures(by_cost, split)
        figures += costs
        if points:
            caption = f"Error rates on {split}, 95 % intervals; dots are seeds"
            drawing = plots.rate_bars(points, f"bars{i}")
            figures.append(Figure(caption, () if costs else _kinds(points), Markup(drawing)))
    return figures + _curves(logs)


def cost_figures(
    points: Mapping[str, Sequence[plots.Point]], split: str, *, legend: bool = True
) -> list[Figure]:
    """Error against each cost (``size_mb``, ``rtf``), of the points that have it.

    Args:
        points: cost -> systems.
        split: what the rates are of, for the caption.
        legend: of the kinds of systems.
    """
    figures = []
    for key, listed in points.items():
        known = [p for p in listed if p.cost]
        if known:
            caption, label = COSTS[key]
            drawing = Markup(plots.cost_plot(known, label, key))
            keys = _kinds(known) if legend else ()
            shade = "; the band is the Pareto front" if len(plots.front(known)) > 1 else ""
            figures.append(Figure(f"Error against {caption} on {split}{shade}", keys, drawing))
    return figures


def _curves(logs: Mapping[str, Mapping[int, Path]]) -> list[Figure]:
    """Learning curves: the error rate on dev (the loss, if no rate was logged), and the training loss."""
    read = {name: [read_log(path) for path in seeds.values()] for name, seeds in logs.items()}
    rated = any(DEV_RATE in row for seeds in read.values() for log in seeds for row in log)
    dev = (DEV_RATE, "token error rate on dev, %", 100.0) if rated else (DEV_LOSS, "loss on dev", 1.0)
    figures = []
    for key, label, scale in (dev, (TRAIN_LOSS, "training loss", 1.0)):
        lines = {
            name: [points for log in seeds if (points := per_epoch(log, key, scale))]
            for name, seeds in read.items()
        }
        if any(lines.values()):
            several = any(len(seeds) > 1 for seeds in lines.values())
            caption = label.split(",")[0].capitalize() + (", thin lines are seeds" if several else "")
            drawing = plots.curves(lines, label, f"curve-{key}")
            figures.append(Figure(caption, _line_keys(list(lines)), Markup(drawing)))
    return figures


def _points(results: Mapping[str, Any], split: str, cost: str) -> list[plots.Point]:
    points = []
    for system in results["systems"]:
        wer = system["splits"].get(split, {}).get("wer") or {}
        if wer.get("mean") is not None:
            seeds = list((wer.get("seeds") or {}).values())
            point = plots.Point(
                system["name"],
                system["kind"],
                wer["mean"],
                wer.get("ci95"),
                rtf(system) if cost == "rtf" else system[cost],
                seeds,
                first_parent(system),
            )
            points.append(point)
    return points


def _kinds(points: Sequence[plots.Point]) -> list[Key]:
    shapes = {"o": "●", "D": "◆", "s": "■", "^": "▲"}
    kinds = [kind for kind in plots.KIND_COLOURS if any(p.kind == kind for p in points)]
    return [Key(k, f"color: var(--c{plots.KIND_COLOURS[k]})", shapes[plots.KIND_MARKERS[k]]) for k in kinds]


def _line_keys(names: Sequence[str]) -> list[Key]:
    borders = [("solid", "dashed", "dotted")[i // plots.NUM_COLOURS % 3] for i in range(len(names))]
    return [
        Key(name, f"border-color: var({plots.colour_of(i)}); border-top-style: {border}")
        for i, (name, border) in enumerate(zip(names, borders, strict=True))
    ]


def per_epoch(log: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """(epoch, mean of ``key`` in it) if it was logged and is finite; averaged weights have no epoch."""
    found: dict[float, list[float]] = {}
    for row in log:
        value, epoch = row.get(key), row.get("epoch")
        if row.get("event") == "end":
            continue
        if isinstance(value, int | float) and isinstance(epoch, int | float) and abs(value) < float("inf"):
            found.setdefault(float(epoch), []).append(scale * value)
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(found.items())]


# ---------------------------------------------------------------- plugins' sections


def from_markdown(text: str) -> list[Block | Heading]:
    """The Markdown that plugins' sections need: paragraphs, lists, tables, headings, code.

    Links, images and HTML stay text.
    """
    blocks: list[Block | Heading] = []
    for block in re.split(r"(```.*?```)|\n\s*\n", text.strip(), flags=re.DOTALL):
        lines = (block or "").strip().splitlines()
        if not lines:
            continue
        if lines[0].startswith("```"):
            blocks.append(Code("\n".join(lines[1:-1])))
        elif lines[0].startswith("#"):
            blocks += [Heading(lines[0].lstrip("# ")), *from_markdown("\n".join(lines[1:]))]
        elif len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|:\- ]+", lines[1]):
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            numeric = frozenset(i for i, rule in enumerate(rows[1]) if rule.endswith(":"))
            blocks.append(Table(rows[0], rows[2:], numeric))
        elif all(re.match(r"[-*] ", line) for line in lines):
            blocks.append([line[2:] for line in lines])
        else:
            blocks.append(" ".join(lines))
    return blocks
