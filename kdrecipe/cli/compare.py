"""Several bundles, exports, measurements or transcripts side by side on one test set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import read_json, write_atomic
from kdrecipe.cli.bench import measure, read_bench, to_recognise, write_bench
from kdrecipe.cli.models import name_of, named
from kdrecipe.errors import DataError, KdrecipeError, Problem
from kdrecipe.measure.device import word_errors
from kdrecipe.report.device import compare_cells, compare_page, plain
from kdrecipe.score.hypotheses import read_hypotheses


def compare(
    items: Sequence[str],
    *,
    data: Path | None = None,
    split: str = "test",
    most: int | None = None,
    out: Path | None = None,
    trust_plugins: bool = False,
) -> list[dict[str, Any]]:
    """Print a table of costs and word errors.

    Args:
        items: two or more, each ``PATH`` or ``NAME=PATH``: a bundle, an export or a file of one (measured
            here on ``data``), a ``bench.json``, or transcripts (``hyps/<system>/seed<k>/test.jsonl``, whose
            costs are those in the ``decode.json`` beside them).
        data: see :func:`kdrecipe.cli.bench.bench`, as the next two.
        split: of ``data``.
        most: at most so many utterances of it.
        out: a directory for ``compare.json`` and ``compare.html``, which has the plots.
        trust_plugins: run the plugin files that bundles bring.

    Returns:
        The rows.

    Raises:
        KdrecipeError: a path is nothing that can be compared, or models are given without ``data``.
        DataError: rows are of different test sets, or of none.
    """
    listed = [named(text) for text in items]
    models = [path for _, path in listed if not _is_measured(path)]
    _check(listed, models, data)
    utterances = to_recognise((), data, split, most) if models else []
    rows: list[dict[str, Any]] = []
    for text, (name, path) in zip(items, listed, strict=True):
        if path in models:
            found = measure(text, utterances, trust_plugins=trust_plugins)
        else:
            found = read_bench(path) if path.suffix == ".json" else [_transcripts(path)]
        rows += [{**row, "name": name or row["name"], "from": str(path)} for row in found]
    _check_test_sets(rows)
    print(f"{len(rows[0]['errors'])} utterances; intervals: 95 %, over utterances")
    print(plain(compare_cells(rows)))
    if out is not None:
        write_bench(out / "compare.json", [{k: v for k, v in row.items() if k != "from"} for row in rows])
        write_atomic(out / "compare.html", compare_page(rows, split))
        print(f"plots: {out / 'compare.html'}")
    return rows


def _is_measured(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and not path.is_dir()


def _check(listed: Sequence[tuple[str | None, Path]], models: Sequence[Path], data: Path | None) -> None:
    if len(listed) < 2:
        raise KdrecipeError("there is nothing to compare it with", remedy="give two or more")
    missing = [Problem("there is no such file or directory", str(p)) for _, p in listed if not p.exists()]
    if missing:
        raise KdrecipeError(missing)
    if models and data is None:
        raise KdrecipeError(
            "models are compared on a test set, and none is given",
            where=str(models[0]),
            remedy="--data DIRECTORY of manifests, or a recipe's work directory (exp)",
        )


def _transcripts(path: Path) -> dict[str, Any]:
    """A row of what stage 8 wrote; costs are None where it says nothing of them."""
    texts = read_hypotheses(path)
    references = {name: reference for name, (reference, _) in texts.items()}
    errors = word_errors(references, {name: said for name, (_, said) in texts.items()})
    decoded = path.with_name("decode.json")
    known: Any = read_json(decoded) if decoded.is_file() else {}
    if not isinstance(known, dict) or not isinstance(known.get("rtf") or {}, dict):
        raise KdrecipeError("not what stage 8 writes", where=str(decoded), remedy="rerun the decode stage")
    rtf = known.get("rtf") or {}
    return {
        "name": name_of(path) if path.parent.name.startswith("seed") else path.stem,
        "model": path.name,
        "variant": "",
        "runtime": known.get("runtime") or "",
        "params": known.get("params"),
        "size_mb": known.get("size_mb"),
        "rtf_median": rtf.get("median"),
        "rtf_p95": rtf.get("p95"),
        "peak_rss_mb": known.get("peak_rss_mb"),
        "load_s": known.get("load_s"),
        **errors,
    }


def _check_test_sets(rows: Sequence[dict[str, Any]]) -> None:
    """DataError unless all rows are of one test set with transcripts."""
    without = [Problem("it has no word errors", row["from"]) for row in rows if row["test_set"] is None]
    if without:
        raise DataError(
            [Problem(p.what, p.where, "measure it on a test set: kdrecipe bench --data") for p in without]
        )
    first, other = rows[0], next((r for r in rows if r["test_set"] != rows[0]["test_set"]), None)
    if other is not None:
        mine, its = set(first["errors"]), set(other["errors"])
        raise DataError(
            f"it is of another test set than {first['from']}: {len(its)} and {len(mine)} utterances, "
            f"{len(mine & its)} of them common" + (", with other references" if mine == its else ""),
            where=other["from"],
            remedy="recognise the same utterances with both; --data measures all models on one test set",
        )
