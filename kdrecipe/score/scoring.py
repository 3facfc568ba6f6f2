"""Stage 9: error rates with intervals, significance, fidelity to the teacher.

Pure functions over hypotheses files. All rates are fractions (0.05 is 5 %). Intervals come from
drawing utterances anew (:mod:`kdrecipe.score.resampling`): they say how far the figure would
move on another test set of the same kind and size. The spread between seeds is told beside it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import Metric
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.score.resampling import RESAMPLES, Array, holm, interval, resampled_sums, sign_flip_p

INTERVAL = "95 % bootstrap over utterances, drawn jointly for all seeds and systems (Bisani & Ney 2004)"
TEST = "matched pairs, sign flips of per-utterance error differences (after Gillick & Cox 1989), two-sided"
FEW_SPEAKERS = 20  # below this, an interval over speakers is a rough one


@dataclass(frozen=True)
class Question:
    """What to compare with what; systems by name.

    Args:
        teachers: student -> its teacher (with several teachers, the one to compare with).
        baselines: student -> the system of the same model and data, trained without a teacher.
        compare: pairs (system, other) to test against each other.
    """

    teachers: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    compare: Sequence[tuple[str, str]] = ()


def score(
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    metrics: Mapping[str, Metric],
    question: Question,
    *,
    speakers: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every split that was decoded.

    Args:
        hyps: system -> seed -> split -> hypotheses file.
        metrics: by name; the first is the one that systems are compared by.
        question: which systems to compare.
        speakers: utterance id -> speaker, for intervals over speakers as well.
        resamples: number of bootstrap resamples and of sign changes.
        seed: of the resampling.

    Returns:
        ``{"method", "splits": {split: <what score_split returns>}}``.

    Raises:
        DataError: hypotheses files that are broken or do not agree.
    """
    by_split: dict[str, dict[str, dict[int, dict[str, tuple[str, str]]]]] = {}
    for system, seeds in hyps.items():
        for number, splits in seeds.items():
            for split, path in splits.items():
                by_split.setdefault(split, {}).setdefault(system, {})[number] = read_hypotheses(path)
    method = {"interval": INTERVAL, "test": TEST, "resamples": resamples, "seed": seed}
    scored = {
        split: score_split(
            texts, metrics, question, split=split, speakers=speakers, resamples=resamples, seed=seed
        )
        for split, texts in by_split.items()
    }
    return {"method": method, "splits": scored}


def score_split(
    texts: Mapping[str, Mapping[int, Mapping[str, tuple[str, str]]]],
    metrics: Mapping[str, Metric],
    question: Question,
    *,
    split: str = "test",
    speakers: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Score one split.

    Args:
        texts: system -> seed -> what :func:`read_hypotheses` returned; other arguments: see :func:`score`.
        split: its name, for messages and comparisons.

    Returns:
        ``utterances``, ``words`` (reference length in the first metric), ``speakers``;
        ``systems``: name -> ``{<metric>: {mean, std, ci95, seeds[, ci95_speakers]}, sub, ins, del,
        gap_recovered, fidelity}`` (``std`` is None for a single seed); ``comparisons``: see
        :func:`_compare`; ``notes``.

    Raises:
        DataError: the systems were decoded on different utterances or references.
    """
    table = _Table(texts, metrics, question, split)
    sums = resampled_sums(table.columns, resamples=resamples, seed=seed)
    known = [speakers.get(u) for u in table.ids] if speakers else [None]
    groups = [str(s) for s in known] if None not in known and len(set(known)) > 1 else None
    by_speaker = (
        resampled_sums(table.columns, groups=groups, resamples=resamples, seed=seed) if groups else None
    )
    systems: dict[str, dict[str, Any]] = {}
    for system in table.texts:
        row = systems[system] = {m: _rate(table, sums, by_speaker, m, system) for m in metrics}
        row.update(table.details.get(system, {}))
        if (teacher := question.teachers.get(system)) in table.texts:
            row["fidelity"] = _fidelity(table, sums, system, str(teacher))
            if (baseline := question.baselines.get(system)) in table.texts:
                row["gap_recovered"] = _gap(table, sums, system, str(baseline), str(teacher))
    pairs = [pair for pair in question.compare if pair[0] in table.texts and pair[1] in table.texts]
    comparisons = [_compare(table, sums, a, b, resamples, seed) for a, b in pairs]
    for found, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        found["p_adjusted"] = p
    num_speakers = len(set(known)) if groups else None
    notes = []
    if num_speakers and num_speakers < FEW_SPEAKERS:
        notes.append(
            f"{split} has {num_speakers} speakers only: intervals over speakers are rough, "
            "and those over utterances leave out how much speakers differ"
        )
    return {
        "utterances": len(table.ids),
        "words": int(table.columns["length", table.primary].sum()),
        "speakers": num_speakers,
        "systems": systems,
        "comparisons": comparisons,
        "notes": notes,
    }


class _Table:
    """Figures per utterance of one split, in one order for all systems.

    ``columns``: ("errors", metric, system): errors, averaged over seeds; ("length", metric);
    ("differing" | "taught" | "agreeing", student): differing words, teacher's words, 1 if alike.
    """

    def __init__(
        self,
        texts: Mapping[str, Mapping[int, Mapping[str, tuple[str, str]]]],
        metrics: Mapping[str, Metric],
        question: Question,
        split: str,
    ) -> None:
        self.split, self.texts, self.metrics = split, texts, metrics
        self.primary = next(iter(metrics))
        self.references = _references(texts, split)
        self.ids = list(self.references)
        self.columns: dict[Any, Array] = {}
        self.rates: dict[tuple[str, str], dict[int, float]] = {}  # (metric, system) -> seed -> rate
        self.details: dict[str, dict[str, float]] = {}
        for name, metric in metrics.items():
            for system in texts:
                self._count(name, metric, system)
        for student, teacher in question.teachers.items():
            if student in texts and teacher in texts:
                self._count_differences(metrics[self.primary], student, teacher)

    def _count(self, name: str, metric: Metric, system: str) -> None:
        errors = {}
        for seed, said in self.texts[system].items():
            pairs = [metric.errors(ref, said[u][1]) for u, ref in self.references.items()]
            errors[seed], length = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
        if not length.sum():
            raise DataError(
                f"the references of {self.split!r} are all empty",
                where=self.split,
                remedy="check the transcripts",
            )
        self.columns["length", name] = length
        self.columns["errors", name, system] = np.mean(list(errors.values()), axis=0)
        self.rates[name, system] = {seed: float(e.sum() / length.sum()) for seed, e in errors.items()}
        if name == self.primary and hasattr(metric, "details"):
            total: dict[str, float] = dict.fromkeys(("sub", "ins", "del"), 0.0)
            for said in self.texts[system].values():
                for utterance, ref in self.references.items():
                    edits = metric.details(ref, said[utterance][1])
                    total = {key: value + edits[key] for key, value in total.items()}
            words = length.sum() * len(errors)
            self.details[system] = {key: _rounded(value / words) for key, value in total.items()}

    def _count_differences(self, metric: Metric, student: str, teacher: str) -> None:
        found = []
        for seed, said in self.texts[student].items():
            seeds = self.texts[teacher]
            taught = seeds.get(seed) or next(iter(seeds.values()))
            pairs = [metric.errors(taught[u][1], said[u][1]) for u in self.ids]
            found.append([(errors, length, errors == 0) for errors, length in pairs])
        means_N3 = np.array(found, dtype=np.float64).mean(axis=0)
        for i, what in enumerate(("differing", "taught", "agreeing")):
            self.columns[what, student] = means_N3[:, i]


def _references(
    texts: Mapping[str, Mapping[int, Mapping[str, tuple[str, str]]]], split: str
) -> dict[str, str]:
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


def _rate(
    table: _Table,
    sums: Mapping[Any, Array],
    by_speaker: Mapping[Any, Array] | None,
    metric: str,
    system: str,
) -> dict[str, Any]:
    """A rate with its spread over seeds and its intervals."""
    rates = list(table.rates[metric, system].values())
    row: dict[str, Any] = {
        "mean": _rounded(float(np.mean(rates))),
        "std": _rounded(float(np.std(rates, ddof=1))) if len(rates) > 1 else None,
        "ci95": _ratio_interval(sums, ("errors", metric, system), ("length", metric)),
        "seeds": {str(seed): _rounded(rate) for seed, rate in table.rates[metric, system].items()},
    }
    if by_speaker is not None:
        row["ci95_speakers"] = _ratio_interval(by_speaker, ("errors", metric, system), ("length", metric))
    return row


def _fidelity(table: _Table, sums: Mapping[Any, Array], student: str, teacher: str) -> dict[str, Any]:
    """How much a student says what its teacher says, right or wrong."""
    differing, taught = table.columns["differing", student].sum(), table.columns["taught", student].sum()
    return {
        "teacher": teacher,
        table.primary: _rounded(float(differing / taught)) if taught else None,
        "ci95": _ratio_interval(sums, ("differing", student), ("taught", student)),
        "agreement": _rounded(float(table.columns["agreeing", student].mean())),
    }


def _gap(
    table: _Table, sums: Mapping[Any, Array], student: str, baseline: str, teacher: str
) -> dict[str, Any] | None:
    """(baseline - student) / (baseline - teacher), or None where the teacher is no better.

    The interval is None where the gap is too small to divide by: resamples in which the
    teacher is no better than the baseline make up more than 2.5 %.
    """
    rates = [
        float(np.mean(list(table.rates[table.primary, name].values())))
        for name in (baseline, student, teacher)
    ]
    if rates[0] <= rates[2]:
        return None
    of = {name: sums["errors", table.primary, name] for name in (baseline, student, teacher)}
    gaps = of[baseline] - of[teacher]
    recovered = np.full_like(gaps, np.nan)
    np.divide(of[baseline] - of[student], gaps, out=recovered, where=gaps > 0)
    return {
        "mean": _rounded((rates[0] - rates[1]) / (rates[0] - rates[2])),
        "ci95": _rounded_pair(interval(recovered)),
        "baseline": baseline,
        "teacher": teacher,
    }


def _compare(
    table: _Table, sums: Mapping[Any, Array], a: str, b: str, resamples: int, seed: int
) -> dict[str, Any]:
    """Test system ``a`` against ``b`` on the same utterances; negative differences favour ``a``.

    ``seed_pairs``: how many pairs of one seed of each ``a`` wins, and of how many: the test
    asks about these trained models, the seeds tell about training them again.
    """
    metric = table.primary
    errors_a, errors_b = table.columns["errors", metric, a], table.columns["errors", metric, b]
    length = sums["length", metric]
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = (sums["errors", metric, a] - sums["errors", metric, b]) / length
    rates_a, rates_b = (list(table.rates[metric, name].values()) for name in (a, b))
    return {
        "split": table.split,
        "metric": metric,
        "a": a,
        "b": b,
        "a_mean": _rounded(float(np.mean(rates_a))),
        "b_mean": _rounded(float(np.mean(rates_b))),
        "difference": _rounded(float(np.mean(rates_a) - np.mean(rates_b))),
        "ci95": _rounded_pair(interval(difference)),
        "p": sign_flip_p(errors_a - errors_b, resamples=resamples, seed=seed),
        "seed_pairs": [sum(x < y for x in rates_a for y in rates_b), len(rates_a) * len(rates_b)],
    }


def _ratio_interval(sums: Mapping[Any, Array], over: Hashable, under: Hashable) -> list[float] | None:
    with np.errstate(invalid="ignore", divide="ignore"):
        return _rounded_pair(interval(sums[over] / sums[under]))


def _rounded_pair(pair: list[float] | None) -> list[float] | None:
    return None if pair is None else [_rounded(x) for x in pair]


def _rounded(value: float) -> float:
    return round(float(value), 6)  # the last digits depend on the order of additions
