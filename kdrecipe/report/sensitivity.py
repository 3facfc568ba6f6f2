"""What each layer bears, as text for the terminal and as a page; see :mod:`kdrecipe.measure.sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from kdrecipe.report import html, plots
from kdrecipe.report.device import NONE, plain
from kdrecipe.report.text import Table

CHANGES = {"int8": "int8", "int4": "int4", "prune": "pruned by half"}
NUM_SHOWN = 15
OUTLIERS_SHOWN = 5


def sensitivity_text(found: Mapping[str, Any]) -> str:
    """The layers that int8 costs most, then what stands out."""
    rows = sorted(found["layers"], key=lambda row: -row["int8"]["kl"])
    headings, *lines = layer_cells(rows[:NUM_SHOWN])
    more = len(rows) - NUM_SHOWN
    rest = [f"and {more} layers that int8 costs less"] if more > 0 else []
    return "\n".join([plain([headings, *lines]), *rest, *findings(found)])


def layer_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings and a line per layer: for each change divergence, WER in points, kB and ms won."""
    headings = ["layer", "kB", "ms"]
    for label in CHANGES.values():
        headings += [f"{label}: KL", "WER", "kB won", "ms won"]
    return [headings, *(_line(row) for row in rows)]


def _line(row: Mapping[str, Any]) -> list[str]:
    cells = [row["name"], f"{row['bytes'] / 1e3:.0f}", _figure(row["ms"], ".2f")]
    for change in CHANGES:
        cost = row[change]
        if cost is None:
            cells += [NONE] * 4
            continue
        wer, kb = f"{100 * cost['wer']:+.2f}", f"{cost['bytes'] / 1e3:.0f}"
        cells += [f"{cost['kl']:.1e}", wer, kb, _figure(cost["ms"], ".2f")]
    return cells


def _figure(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def findings(found: Mapping[str, Any]) -> list[str]:
    """Sentences: the layers that cost most, outlier channels, where bundle and export part."""
    said = []
    for change, label in CHANGES.items():
        rows = sorted((row for row in found["layers"] if row[change]), key=lambda row: -row[change]["kl"])
        if not rows:
            continue
        middle = median(row[change]["kl"] for row in rows) or float("nan")
        bad = found["worst"][change]
        for row in [row for row in rows if row["name"] in bad] or rows[:1]:
            nats = row[change]["kl"]
            what = "stands out" if row["name"] in bad else "costs most"
            said.append(
                f"{label}: {row['name']} {what}: {nats:.2g} nats, {nats / middle:.0f} times the median"
            )
    said += [f"outlier channels: {r['name']}: {_outliers(r)}" for r in found["layers"] if r["outliers"]]
    if kept := found["worst"]["int8"]:
        said.append(f"to keep them in float: layers: {{{', '.join(f'{name}: float' for name in kept)}}}")
    return said + list(found.get("export", []))


def _outliers(row: Mapping[str, Any]) -> str:
    shown = [f"{channel} ({times:.0f} times the median)" for channel, times in row["outliers"].items()]
    more = len(shown) - OUTLIERS_SHOWN
    return ", ".join(shown[:OUTLIERS_SHOWN] + ([f"{more} more"] if more > 0 else []))


def sensitivity_page(found: Mapping[str, Any], name: str) -> str:
    """The plot, the findings and the whole table, as one self-contained page."""
    rows = found["layers"]
    values = {
        label: [row[change]["kl"] if row[change] else None for row in rows]
        for change, label in CHANGES.items()
    }
    drawing = Markup(
        plots.layers([row["name"] for row in rows], values, "divergence, nats per step", "layers")
    )
    keys = [
        html.Key(label, f"color: var({plots.colour_of(i)})", mark)
        for i, (label, mark) in enumerate(zip(values, "●■▲", strict=True))
    ]
    figure = html.Figure("What one layer alone costs", keys, drawing)
    headings, *lines = layer_cells(rows)
    table = Table(headings, lines, frozenset(range(1, len(headings))))
    notes = (
        "KL: divergence from the model as it is, in nats per frame (of attention per token). WER: points. "
        "ms: the product for 10 s of audio in onnxruntime on one thread. int8: weights with a scale per "
        "output, inputs of linear layers with one per frame; int4: weights with a scale per 32 inputs; "
        "pruned: without the half of the inputs that matter least by weight times input."
    )
    parts = [
        html.Part("Findings", "blocks", [findings(found)]),
        html.Part("Plot", "plots", [figure]),
        html.Part("Layers", "blocks", [notes, table]),
    ]
    words = f"{found['utterances']} utterances, WER {100 * found['wer']:.2f} %"
    return html.render(f"Sensitivity of {name}", words, parts)
