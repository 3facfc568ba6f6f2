"""The searches of a system compared with each other, by the same statistics as systems.

Each search counts as a system here: ``kd/beam`` is the system ``kd`` searched by the decoder that the
recipe calls ``beam``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrecipe.interfaces import Metric
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.score.scoring import Question, score

LM_OPTIONS = ("lm_", "length_bonus")  # how the names of options begin that belong to a language model


def score_searches(
    hyps: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Path]]]],
    facts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    metrics: Mapping[str, Metric],
    *,
    speakers: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Score all searches of the systems that have several.

    Args:
        hyps: system -> label of the search, the main one first -> seed -> split -> hypotheses file.
        facts: system -> label -> ``decoder``, ``options``, ``lm`` (whether it uses a language model).
        metrics: by name; searches are compared by the first.
        speakers: see :func:`kdrecipe.score.scoring.score`.

    Returns:
        Per system and search ``{"system", "search", "splits", "comparisons"}``: ``splits`` as for a
        system; ``comparisons`` with the system's main search and, for a search with a language
        model, with the same search without it. The p-values allow for all comparisons of searches.
        Seeds are paired, since both searches use the same models.

    Raises:
        DataError: hypotheses files are damaged or do not agree.
    """
    several = {system: labels for system, labels in hyps.items() if len(labels) > 1}
    if not several:
        return []
    files = {_name(system, x): seeds for system, labels in several.items() for x, seeds in labels.items()}
    compare = [(_name(s, a), _name(s, b)) for s in several for a, b in pairs(facts[s])]
    question = Question(compare=compare, families={_name(s, x): s for s in several for x in several[s]})
    scored = score(files, metrics, question, speakers=speakers)["splits"]
    rows = []
    for system, labels in several.items():
        for label in labels:
            name = _name(system, label)
            found = [_of_labels(c) for part in scored.values() for c in part["comparisons"] if c["a"] == name]
            splits = {split: part["systems"][name] for split, part in scored.items()}
            rows.append({"system": system, "search": label, "splits": splits, "comparisons": found})
    return rows


def mean_rates(
    hyps: Mapping[int, Mapping[str, Path]], metrics: Mapping[str, Metric]
) -> dict[str, dict[str, float]]:
    """Split -> metric -> error rate, averaged over seeds.

    Args:
        hyps: seed -> split -> hypotheses file.
        metrics: by name.
    """
    found: dict[str, dict[str, float]] = {}
    for splits in hyps.values():
        for split, path in splits.items():
            texts = read_hypotheses(path).values()
            for name, metric in metrics.items():
                errors, lengths = zip(*(metric.errors(*pair) for pair in texts), strict=True)
                rates = found.setdefault(split, {})
                rates[name] = rates.get(name, 0.0) + sum(errors) / max(1, sum(lengths)) / len(hyps)
    return {split: {name: round(rate, 6) for name, rate in rates.items()} for split, rates in found.items()}


def pairs(facts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Labels to compare: each with the first, and one with a language model with the same one without."""
    main = next(iter(facts))
    found = [(label, main) for label in facts if label != main]
    for label, search in facts.items():
        plain = next((x for x, other in facts.items() if _is_without_lm(other, search)), None)
        if plain is not None and (label, plain) not in found and (plain, label) not in found:
            found.append((label, plain))
    return found


def _is_without_lm(candidate: Mapping[str, Any], search: Mapping[str, Any]) -> bool:
    """Whether ``candidate`` is the same as ``search`` without its language model."""
    alike = candidate["decoder"] == search["decoder"] and _plain(candidate) == _plain(search)
    return bool(search["lm"]) and not candidate["lm"] and alike


def _plain(search: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in search["options"].items() if not key.startswith(LM_OPTIONS)}


def _name(system: str, label: str) -> str:
    return f"{system}/{label}"  # names of systems have no slash


def _of_labels(found: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison with labels instead of names."""
    return {**found, **{x: found[x].partition("/")[2] for x in ("a", "b")}}
