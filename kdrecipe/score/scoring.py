"""Stage 9: error rates with intervals, significance, fidelity to the teacher.

Pure functions over hypotheses files. All rates are fractions (0.05 is 5 %). Intervals and p-values
come from one model of the variance (:mod:`kdrecipe.score.intervals`): they say how far a figure would
move with other speakers and utterances of the same kind and number, and with other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import Metric
from kdrecipe.score.facts import text_facts
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.score.intervals import (
    MIN_SEEDS,
    MIN_SPEAKERS,
    Estimate,
    holm,
    quotient_interval,
    rate,
)

INTERVAL = (
    "95 %, Student's t on the variance between speakers, each with all its utterances (between utterances "
    f"where speakers are not known or fewer than {MIN_SPEAKERS}), and, with {MIN_SEEDS} seeds or more, "
    "between seeds, as crossed random effects (Clark 1973), degrees of freedom after Satterthwaite (1946); "
    "of gap recovered after Fieller (1954)"
)
TEST = "t-test of the difference on the same variances as its interval, paired over utterances, two-sided"
Texts = Mapping[str, Mapping[int, Mapping[str, tuple[str, str]]]]


@dataclass(frozen=True)
class Question:
    """Which systems to compare; by name.

    Args:
        teachers: student -> its teacher (of several, the one to compare with).
        baselines: student -> the system with the same model and data, trained without a teacher.
        compare: pairs (system, other) to test against each other.
        families: system -> its family. Systems of one family with the same seeds are paired over
            seeds: one was made from the other with the same seed, or both from a third. The seeds
            of all others are independent, also those of a system that is not listed here.
    """

    teachers: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    compare: Sequence[tuple[str, str]] = ()
    families: Mapping[str, str] = field(default_factory=dict)


def score(
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    metrics: Mapping[str, Metric],
    question: Question,
    *,
    speakers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score every split that was decoded.

    Args:
        hyps: system -> seed -> split -> hypotheses file.
        metrics: by name; systems are compared by the first.
        question: which systems to compare.
        speakers: utterance id -> speaker, where it is known.

    Returns:
        ``{"method", "splits": {split: <what score_split returns>}}``.

    Raises:
        DataError: hypotheses files are damaged or do not agree.
    """
    by_split: dict[str, dict[str, dict[int, dict[str, tuple[str, str]]]]] = {}
    for system, seeds in hyps.items():
        for number, splits in seeds.items():
            for split, path in splits.items():
                by_split.setdefault(split, {}).setdefault(system, {})[number] = read_hypotheses(path)
    scored = {
        split: score_split(texts, metrics, question, split=split, speakers=speakers)
        for split, texts in by_split.items()
    }
    return {"method": {"interval": INTERVAL, "test": TEST}, "splits": scored}


def score_split(
    texts: Texts,
    metrics: Mapping[str, Metric],
    question: Question,
    *,
    split: str = "test",
    speakers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score one split.

    Args:
        texts: system -> seed -> the result of :func:`read_hypotheses`; other arguments: see :func:`score`.
        split: its name, for messages and comparisons.

    Returns:
        ``utterances``, ``words`` (reference length in the first metric), ``speakers`` (None if
        they are not known), ``units`` (``speakers`` or ``utterances``: the units whose variance
        intervals and tests use); ``systems``: name -> ``{<metric>: {mean, std, ci95, seeds}, sub,
        ins, del, gap_recovered, fidelity}`` (``std`` is None for a single seed); ``comparisons``:
        see :func:`_compare`; ``notes``.

    Raises:
        DataError: the systems were decoded on different utterances or references.
    """
    table = _Table(texts, metrics, question, split, speakers)
    systems: dict[str, dict[str, Any]] = {}
    for system in table.texts:
        row = systems[system] = {m: _rate(table, m, system) for m in metrics}
        row.update(table.details.get(system, {}))
        if (teacher := question.teachers.get(system)) in table.texts:
            row["fidelity"] = _fidelity(table, system, str(teacher))
            if (baseline := question.baselines.get(system)) in table.texts:
                row["gap_recovered"] = _gap(table, system, str(baseline), str(teacher))
    pairs = [pair for pair in question.compare if pair[0] in table.texts and pair[1] in table.texts]
    comparisons = [_compare(table, a, b) for a, b in pairs]
    for found, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        found["p_adjusted"] = p
    return {
        "utterances": len(table.ids),
        "words": table.words,
        "speakers": table.units.speakers,
        "units": table.units.kind,
        "systems": systems,
        "comparisons": comparisons,
        "notes": ([table.units.note] if table.units.note else []) + _facts(table),
    }


@dataclass(frozen=True)
class _Units:
    """The sampling units of a split: ``of_N`` has the number of each utterance's unit."""

    of_N: NDArray[np.intp]
    kind: str
    speakers: int | None
    note: str | None = None


def _units(ids: Sequence[str], speakers: Mapping[str, str] | None, split: str) -> _Units:
    """Speakers if all are known and there are enough of them, otherwise single utterances."""
    known = [(speakers or {}).get(utterance) for utterance in ids]
    alone_N = np.arange(len(ids))
    rest = "intervals and p-values rest on single utterances and leave out how much speakers differ"
    if None in known:
        return _Units(alone_N, "utterances", None, f"{split} does not name every speaker: {rest}")
    names, of_N = np.unique([str(speaker) for speaker in known], return_inverse=True)
    if len(names) < MIN_SPEAKERS:
        few = f"{split} has {'one speaker' if len(names) == 1 else f'{len(names)} speakers'} only"
        return _Units(alone_N, "utterances", len(names), f"{few}: {rest}")
    return _Units(of_N, "speakers", len(names))


class _Table:
    """Figures of one split with the contribution of each sampling unit, in the same order for all systems.

    ``rates``: (metric, system) -> its error rate; ``unlike``: student -> the rate of words in which
    it differs from its teacher, None if the teacher says no word; ``alike``: the share of equal texts.
    """

    def __init__(
        self,
        texts: Texts,
        metrics: Mapping[str, Metric],
        question: Question,
        split: str,
        speakers: Mapping[str, str] | None,
    ) -> None:
        self.split, self.texts, self.metrics = split, texts, metrics
        self.primary = next(iter(metrics))
        self.families = question.families
        self.references = _references(texts, split)
        self.ids = list(self.references)
        self.units = _units(self.ids, speakers, split)
        self.words = 0
        self.rates: dict[tuple[str, str], Estimate] = {}
        self.details: dict[str, dict[str, float]] = {}
        self.unlike: dict[str, Estimate | None] = {}
        self.alike: dict[str, float] = {}
        for name, metric in metrics.items():
            for system in texts:
                self._count(name, metric, system)
        for student, teacher in question.teachers.items():
            if student in texts and teacher in texts:
                self._count_differences(metrics[self.primary], student, teacher)

    def key(self, system: str) -> tuple[str, tuple[int, ...]]:
        """The key of the system's set of seeds; systems with the same key are paired over seeds."""
        return self.families.get(system, system), tuple(sorted(self.texts[system]))

    def seed_rates(self, metric: str, system: str) -> dict[int, float]:
        """Seed -> error rate, in ascending order of seeds."""
        key = self.key(system)
        values_R, _ = self.rates[metric, system].parts[key]
        return dict(zip(key[1], values_R.tolist(), strict=True))

    def _count(self, name: str, metric: Metric, system: str) -> None:
        seeds = [self.texts[system][seed] for seed in self.key(system)[1]]
        counted = [[metric.errors(ref, said[u][1]) for u, ref in self.references.items()] for said in seeds]
        errors_RN, lengths_RN = np.moveaxis(np.array(counted, dtype=np.float64), -1, 0)
        if not lengths_RN[0].sum():
            raise DataError(
                f"the references of {self.split!r} are all empty",
                where=self.split,
                remedy="check the transcripts",
            )
        self.rates[name, system] = rate(errors_RN, lengths_RN, self.units.of_N, self.key(system))
        if name != self.primary:
            return
        self.words = int(lengths_RN[0].sum())
        if hasattr(metric, "details"):
            total: dict[str, float] = dict.fromkeys(("sub", "ins", "del"), 0.0)
            for said in seeds:
                for utterance, ref in self.references.items():
                    edits = metric.details(ref, said[utterance][1])
                    total = {key: value + edits[key] for key, value in total.items()}
            self.details[system] = {key: _rounded(x / lengths_RN.sum()) for key, x in total.items()}

    def _count_differences(self, metric: Metric, student: str, teacher: str) -> None:
        found = []
        for seed in self.key(student)[1]:
            said, seeds = self.texts[student][seed], self.texts[teacher]
            taught = seeds.get(seed) or next(iter(seeds.values()))
            found.append([metric.errors(taught[u][1], said[u][1]) for u in self.ids])
        differing_RN, taught_RN = np.moveaxis(np.array(found, dtype=np.float64), -1, 0)
        self.alike[student] = float((differing_RN == 0).mean())
        known = bool(taught_RN.sum(axis=1).all())
        key = self.key(student)
        self.unlike[student] = rate(differing_RN, taught_RN, self.units.of_N, key) if known else None


def _references(texts: Texts, split: str) -> dict[str, str]:
    """Utterance id -> reference, sorted; all systems must agree on them."""
    every = [
        (f"{system}, seed {seed}, {split}", said) for system, s in texts.items() for seed, said in s.items()
    ]
    first_name, first = every[0]
    problems = []
    for name, said in every[1:]:
        missing, extra = sorted(first.keys() - said.keys()), sorted(said.keys() - first.keys())
        changed = sorted(u for u in first.keys() & said.keys() if first[u][0] != said[u][0])
        for utterances, what in (
            (missing, "lacks"),
            (extra, "has in addition"),
            (changed, "has other references for"),
        ):
            if utterances:
                message = (
                    f"{what} {len(utterances)} utterances ({utterances[0]!r}, ...) compared with {first_name}"
                )
                problems.append(Problem(message, name, "decode both again from the same cuts"))
    if problems:
        raise DataError(problems)
    return {utterance: first[utterance][0] for utterance in sorted(first)}


def _facts(table: _Table) -> list[str]:
    """See :func:`text_facts`; of a system with several seeds, by its first."""
    said = {}
    for system in table.texts:
        first = table.texts[system][table.key(system)[1][0]]
        said[system] = {utterance: first[utterance][1] for utterance in table.ids}
    return text_facts(table.references, said, table.metrics, table.split)


def _rate(table: _Table, metric: str, system: str) -> dict[str, Any]:
    """A rate with its spread over seeds and its interval."""
    found, seeds = table.rates[metric, system], table.seed_rates(metric, system)
    return {
        "mean": _rounded(found.value),
        "std": _rounded(float(np.std(list(seeds.values()), ddof=1))) if len(seeds) > 1 else None,
        "ci95": _rounded_pair(found.positive_interval()),
        "seeds": {str(seed): _rounded(value) for seed, value in seeds.items()},
    }


def _fidelity(table: _Table, student: str, teacher: str) -> dict[str, Any]:
    """How often a student says the same as its teacher, right or wrong."""
    unlike = table.unlike[student]
    return {
        "teacher": teacher,
        table.primary: None if unlike is None else _rounded(unlike.value),
        "ci95": None if unlike is None else _rounded_pair(unlike.positive_interval()),
        "agreement": _rounded(table.alike[student]),
    }


def _gap(table: _Table, student: str, baseline: str, teacher: str) -> dict[str, Any] | None:
    """(baseline - student) / (baseline - teacher), or None if the teacher is no better than the baseline.

    The interval is None if the gap is too small to divide by, that is, if its own interval reaches 0.
    """
    before, after, best = (table.rates[table.primary, name] for name in (baseline, student, teacher))
    gained, gap = before - after, before - best
    if gap.value <= 0:
        return None
    return {
        "mean": _rounded(gained.value / gap.value),
        "ci95": _rounded_pair(quotient_interval(gained, gap)),
        "baseline": baseline,
        "teacher": teacher,
    }


def _compare(table: _Table, a: str, b: str) -> dict[str, Any]:
    """Test system ``a`` against ``b`` on the same utterances; negative differences favour ``a``.

    Also ``seeds_won``: the number of seeds with which ``a`` has the lower rate, the number with which
    ``b`` has it, and the number of all. If the seeds of the two are independent, it is ``seed_pairs``
    instead: the same numbers over all pairs of one seed of each.
    """
    metric = table.primary
    ours, theirs = table.rates[metric, a], table.rates[metric, b]
    difference = ours - theirs
    return {
        "split": table.split,
        "metric": metric,
        "a": a,
        "b": b,
        "a_mean": _rounded(ours.value),
        "b_mean": _rounded(theirs.value),
        "difference": _rounded(difference.value),
        "ci95": _rounded_pair(difference.interval()),
        "p": difference.p_value(),
        **_won(table, a, b),
    }


def _won(table: _Table, a: str, b: str) -> dict[str, list[int]]:
    """``seeds_won`` or ``seed_pairs``, see :func:`_compare`."""
    ours, theirs = (list(table.seed_rates(table.primary, name).values()) for name in (a, b))
    paired = table.key(a) == table.key(b)
    pairs = list(zip(ours, theirs, strict=True) if paired else product(ours, theirs))
    won = [sum(x < y for x, y in pairs), sum(x > y for x, y in pairs), len(pairs)]
    crossed = not paired and min(len(ours), len(theirs)) > 1
    return {"seed_pairs" if crossed else "seeds_won": won}


def _rounded_pair(pair: list[float] | None) -> list[float] | None:
    return None if pair is None else [_rounded(x) for x in pair]


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0  # the last digits depend on the order of additions; no -0.0
