"""The report as one page that stands alone: style, script, plots and audio are inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kdrecipe.report import plots
from kdrecipe.report.listen import Audio, Listening, section, select
from kdrecipe.report.reading import first_parent
from kdrecipe.report.text import Code, Section, Table, sections, split_names

_ASSETS = Path(__file__).parent / "templates"
_VERDICTS = {"better": "▲", "worse": "▼", "same": "=", "fact": "•", "caution": "!"}
_BEFORE_PLOTS = ("Claims", "Systems", "Searches", "Comparisons")
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
    name = escape(str(results["recipe"]["name"]))
    body = sections(results)
    reading, *rest, made = body
    parts = [_Part(reading.title, _reading(results, reading))]
    first = [s for s in rest if s.title.startswith(_BEFORE_PLOTS)]
    parts += [_Part(s.title, _blocks(s)) for s in first]
    parts.append(_Part("Plots", _plots(results, logs)))
    parts.append(_Part("Where they differ", section(select(results["systems"], hyps, audio, listening))))
    parts += [_Part(s.title, _blocks(s)) for s in rest if s not in first]
    parts += [_Part(item["title"], from_markdown(item["markdown"])) for item in results["sections"]]
    parts.append(_Part(made.title, _blocks(made)))
    links = "".join(f'<a href="#part{i}">{escape(part.title)}</a>' for i, part in enumerate(parts))
    content = "".join(
        f'<section id="part{i}" aria-labelledby="title{i}">'
        f'<h2 id="title{i}">{escape(p.title)}</h2>{p.html}</section>\n'
        for i, p in enumerate(parts)
    )
    style, script = ((_ASSETS / file).read_text(encoding="utf-8") for file in ("report.css", "report.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Results of {name}</title>
<style>
{style}</style>
</head>
<body>
<header class="top">
<div><h1>{name}</h1><p>{escape(results["subtitle"])}</p></div>
<button id="theme" type="button" aria-label="Switch between light and dark">◐</button>
<nav aria-label="Parts">{links}</nav>
</header>
<main>
{content}</main>
<script>
{script}</script>
</body>
</html>
"""


class _Part:
    """A heading of the page and the HTML under it."""

    def __init__(self, title: str, html: str) -> None:
        self.title, self.html = title, html


def _reading(results: Mapping[str, Any], reading: Section) -> str:
    if not results["reading"]:
        return _blocks(reading)
    items = "".join(
        f'<li class="{item["verdict"]}"><span aria-hidden="true">{_VERDICTS[item["verdict"]]}</span>'
        f"<p>{_inline(item['text'])}</p></li>"
        for item in results["reading"]
    )
    return f'<ul class="reading">{items}</ul>'


# ---------------------------------------------------------------- plots


def _plots(results: Mapping[str, Any], logs: Mapping[str, Mapping[int, Path]]) -> str:
    """Size against error, bars for every split, learning curves."""
    figures = []
    splits = split_names(results)
    for i, split in enumerate(splits):
        points = _points(results, split)
        if i == 0 and (sized := [p for p in points if p.size]):
            figures.append(
                _figure(plots.size_plot(sized, "MB", "size"), f"Error against size on {split}", _kinds(sized))
            )
        if points:
            caption = f"Error rates on {split}, 95 % intervals; dots are seeds"
            figures.append(
                _figure(
                    plots.rate_bars(points, f"bars{i}"), caption, "" if i == 0 and sized else _kinds(points)
                )
            )
    figures += _curves(logs)
    return f'<div class="plots">{"".join(figures)}</div>' if figures else "<p>Nothing to plot.</p>"


def _curves(logs: Mapping[str, Mapping[int, Path]]) -> list[str]:
    """Learning curves: the error rate on dev (its loss where no rate was logged), and the training loss."""
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
            figures.append(_figure(drawing, caption, _lines_legend(list(lines))))
    return figures


def _points(results: Mapping[str, Any], split: str) -> list[plots.Point]:
    points = []
    for system in results["systems"]:
        wer = system["splits"].get(split, {}).get("wer") or {}
        if wer.get("mean") is not None:
            seeds = list((wer.get("seeds") or {}).values())
            size, parent = system["size_mb"], first_parent(system)
            point = plots.Point(
                system["name"], system["kind"], wer["mean"], wer.get("ci95"), size, seeds, parent
            )
            points.append(point)
    return points


def _figure(svg: str, caption: str, legend: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{legend}{svg}</figure>"


def _kinds(points: Sequence[plots.Point]) -> str:
    shapes = {"o": "●", "D": "◆", "s": "■", "^": "▲"}
    kinds = [kind for kind in plots.KIND_COLOURS if any(p.kind == kind for p in points)]
    items = "".join(
        f'<li><span style="color: var(--c{plots.KIND_COLOURS[k]})" aria-hidden="true">'
        f"{shapes[plots.KIND_MARKERS[k]]}</span> {k}</li>"
        for k in kinds
    )
    return f'<ul class="legend">{items}</ul>'


def _lines_legend(names: Sequence[str]) -> str:
    items = []
    for i, name in enumerate(names):
        border = ("solid", "dashed", "dotted")[i // plots.NUM_COLOURS % 3]
        style = f"border-color: var({plots.colour_of(i)}); border-top-style: {border}"
        items.append(f'<li><span class="swatch" style="{style}"></span> {escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log; a last line cut short by a kill is left out, a missing file is empty."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def per_epoch(log: Sequence[Mapping[str, Any]], key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    """(epoch, mean of ``key`` in it) where it was logged and is finite; averaged weights have no epoch."""
    found: dict[float, list[float]] = {}
    for row in log:
        value, epoch = row.get(key), row.get("epoch")
        if row.get("event") == "end":
            continue
        if isinstance(value, int | float) and isinstance(epoch, int | float) and abs(value) < float("inf"):
            found.setdefault(float(epoch), []).append(scale * value)
    return [(epoch, sum(values) / len(values)) for epoch, values in sorted(found.items())]


# ---------------------------------------------------------------- text to HTML


def _blocks(section: Section) -> str:
    parts = []
    for block in section.blocks:
        if isinstance(block, Table):
            parts.append(_table(block))
        elif isinstance(block, Code):
            parts.append(f"<pre><code>{escape(block.text)}</code></pre>")
        elif isinstance(block, list):
            parts.append(f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in block)}</ul>")
        else:
            parts.append(f"<p>{_inline(block)}</p>")
    return "".join(parts)


def _table(table: Table) -> str:
    kinds = [
        "number" if i in table.numeric else "prose" * (i in table.prose) for i in range(len(table.headers))
    ]
    look = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(
        f'<th scope="col"{x}>{_inline(cell)}</th>' for x, cell in zip(look, table.headers, strict=True)
    )
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{x}>{_inline(cell)}</td>" for x, cell in zip(look[1:], rest, strict=False))
        rows.append(f'<tr><th scope="row"{look[0]}>{_inline(first)}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="data">{body}</table></div>'


def _inline(text: str) -> str:
    """Escaped, then ``**bold**`` and `` `code` ``."""
    text = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", escape(text))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def from_markdown(text: str) -> str:
    """The Markdown that plugins' sections need: paragraphs, lists, tables, headings, code.

    Everything is escaped; links and images stay text.
    """
    parts = []
    for block in re.split(r"(```.*?```)|\n\s*\n", text.strip(), flags=re.DOTALL):
        lines = (block or "").strip().splitlines()
        if not lines:
            continue
        if lines[0].startswith("```"):
            parts.append(f"<pre><code>{escape(chr(10).join(lines[1:-1]))}</code></pre>")
        elif lines[0].startswith("#"):
            parts.append(f"<h3>{_inline(lines[0].lstrip('# '))}</h3>{from_markdown(chr(10).join(lines[1:]))}")
        elif len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|:\- ]+", lines[1]):
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            numeric = frozenset(i for i, rule in enumerate(rows[1]) if rule.endswith(":"))
            parts.append(_table(Table(rows[0], rows[2:], numeric)))
        elif all(re.match(r"[-*] ", line) for line in lines):
            parts.append(f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "".join(parts)
