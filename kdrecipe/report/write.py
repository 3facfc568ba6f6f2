"""Stage 10: ``results.json``, ``RESULTS.md`` and ``report.html`` from everything measured."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import KdrecipeError
from kdrecipe.report import html, reading, text
from kdrecipe.report.listen import Audio, Listening
from kdrecipe.score.claims import beside

FORMAT = 2
UNITS = {
    "wer, cer, baseline_cer, sub, ins, del, fidelity, agreement, gap_recovered": "fractions (0.05 is 5 %)",
    "rtf": "seconds of computing per second of audio, one thread; of a system: by the scored search",
    "size_mb, peak_rss_mb": "10^6 bytes",
    "std": "over seeds; null for a single one",
    "value, measured and ci95 of claims": "percent for wer, fractions for ratios",
    "ci95": "[low, high], 95 % interval, see method; null if it is undefined",
    "p, p_adjusted": "from the same variances as ci95; the second allows for the number of comparisons",
    "seeds_won": "[seeds in which a has the lower rate, in which b has, all]",
    "seed_pairs": "the same for pairs of one seed of each, where the seeds are independent",
    "robustness": "error rates by the metric of that name, of the same utterances under each condition",
    "units": "speakers or utterances: the units whose variance intervals and p-values use",
}
_OPTIONAL = (
    "parent",
    "params",
    "size_mb",
    "rtf",
    "peak_rss_mb",
    "fidelity",
    "runtime",
    "search",
    "bundle",
    "parity",
    "compression",
    "train",
)
_PERSONAL = re.compile(r"host|user|home|path|dir|^(node|name|ip|mac)(_|$)", re.IGNORECASE)
_LOCAL_PATH = re.compile(r"(?<![\w.:/~$}-])(?:~|/)(?:[\w.+@-]*/)+(?=[\w.+@-])")


def write_report(
    data: Mapping[str, Any],
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    logs: Mapping[str, Mapping[int, Path]],
    out_dir: Path,
    *,
    audio: Audio | None = None,
    listening: Listening | None = None,
) -> None:
    """Write the three files into ``out_dir``; equal input gives equal bytes.

    Args:
        data: ``recipe``, ``corpus_summary``, ``systems``, and optionally ``scores`` (the result of
            :func:`kdrecipe.score.scoring.score`, which gives ``splits`` of each system,
            ``comparisons``, ``method``), ``comparisons``, ``searches`` (the result of
            :func:`kdrecipe.score.searches.score_searches`, with ``rtf``, ``decoder`` and
            ``options`` of each), ``guard`` (verdicts on teachers, see
            :func:`kdrecipe.report.guard.verdict`), ``seconds`` (by job), ``sections``
            (``{title, markdown}``) and ``claims`` (fields of :class:`kdrecipe.recipe.sections.Claim`).
        hyps: system -> seed -> split -> hypotheses file, for the utterances on the page.
        logs: system -> seed -> the training's ``log.jsonl``.
        out_dir: created if need be.
        audio: (split, utterance id) -> (samples in [-1, 1], sampling rate) or None.
        listening: how many utterances the page has, and how much audio; None: the defaults.

    Raises:
        KdrecipeError: a system has no name, or two have the same.
    """
    results = assemble(data)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(
        out_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_atomic(out_dir / "RESULTS.md", text.markdown(results))
    page = html.page(results, hyps, logs, audio=audio, listening=listening or Listening())
    write_atomic(out_dir / "report.html", page)


def assemble(data: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``results.json``: ``data``, checked and completed, without local paths and names.

    Every system has the same keys; a figure that was not measured is None. ``reading`` has the
    sentences that follow from the figures.
    """
    scores = data.get("scores") or {}
    by_split = scores.get("splits") or {}
    comparisons = data.get("comparisons")
    if comparisons is None:
        comparisons = [c for facts in by_split.values() for c in facts["comparisons"]]
    recipe = dict(data["recipe"])
    machine = recipe.get("machine") or {}
    recipe["machine"] = {key: value for key, value in machine.items() if not _PERSONAL.search(str(key))}
    results: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe,
        "units": UNITS,
        "corpus_summary": dict(data.get("corpus_summary") or {}),
        "systems": [_system(system, by_split) for system in data["systems"]],
        "guard": [dict(row) for row in data.get("guard") or []],
        "comparisons": list(comparisons),
        "searches": [dict(row) for row in data.get("searches") or []],
        "method": scores.get("method"),
        "splits": {
            split: {key: facts.get(key) for key in ("utterances", "words", "speakers", "units", "notes")}
            for split, facts in by_split.items()
        },
        "robustness": dict(scores.get("robustness") or {}),
        "claims": [],
        "seconds": dict(data.get("seconds") or {}),
        "sections": [dict(section) for section in data.get("sections") or []],
    }
    names = [system["name"] for system in results["systems"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KdrecipeError(f"systems of the same name: {', '.join(twice)}", remedy="give each its own name")
    claims, corpus = data.get("claims") or [], _corpus_name(recipe)
    results["claims"] = beside(claims, results["systems"], corpus)
    cleaned: dict[str, Any] = _clean(results)
    cleaned["subtitle"] = _subtitle(cleaned["recipe"])
    cleaned["reading"] = reading.reading(cleaned)
    return cleaned


def _system(given: Mapping[str, Any], by_split: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table with all its keys."""
    if not given.get("name"):
        raise KdrecipeError(
            "a system has no name", where=str(dict(given))[:80], remedy="name it in the recipe"
        )
    name = given["name"]
    splits = given.get("splits")
    if splits is None:
        splits = {s: facts["systems"][name] for s, facts in by_split.items() if name in facts["systems"]}
    system: dict[str, Any] = {
        "name": name,
        "kind": given.get("kind") or "trained",
        "seeds": list(given.get("seeds") or []),
        **{key: given.get(key) for key in _OPTIONAL},
        "splits": dict(splits),
    }
    main: Mapping[str, Any] = next(iter(splits.values()), {})
    if system["fidelity"] is None:
        system["fidelity"] = main.get("fidelity")
    if system["kind"] == "distilled" or "gap_recovered" in given or "gap_recovered" in main:
        gap = given.get("gap_recovered", main.get("gap_recovered"))
        system["gap_recovered"] = gap.get("mean") if isinstance(gap, Mapping) else gap
    known = {*_OPTIONAL, "name", "kind", "seeds", "splits", "gap_recovered"}
    return system | {key: value for key, value in given.items() if key not in known}


def _clean(value: Any) -> Any:
    """JSON without local paths, and without infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in (value if isinstance(value, Sequence) else sorted(value))]
    if isinstance(value, str | Path):
        return _LOCAL_PATH.sub("…/", str(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)  # numpy's too
    number = float(value)
    return number if math.isfinite(number) else None


def _corpus_name(recipe: Mapping[str, Any]) -> str:
    corpus = recipe.get("corpus")
    return str((corpus.get("name") if isinstance(corpus, Mapping) else corpus) or "")


def _subtitle(recipe: Mapping[str, Any]) -> str:
    """Corpus, profile, seeds and date in one line."""
    seeds = [str(seed) for seed in recipe.get("seeds") or []]
    corpus = _corpus_name(recipe)
    facts = [
        f"corpus {corpus}" if corpus else "",
        f"profile {recipe['profile']}" if recipe.get("profile") else "",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else "",
        str(recipe.get("date") or ""),
    ]
    return " · ".join(fact for fact in facts if fact)
