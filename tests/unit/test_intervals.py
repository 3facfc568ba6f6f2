"""Intervals and p-values: on simulated tables whose truth is known, and where statistics are known."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kdrecipe.score.intervals import (
    Estimate,
    holm,
    quotient_interval,
    rate,
    t_p_value,
    t_quantile,
)

Array = NDArray[np.float64]
TABLES = 500
# log-odds of an error in a word: mean of a baseline, a student and a teacher, and deviations between
# speakers, utterances and seeds, and of seeds for some speakers. Four in five parts of how hard
# speakers and utterances are is the same for all systems.
MEANS = {"baseline": -1.0, "student": -1.4, "teacher": -2.2}
SPEAKERS, UTTERANCES, TOGETHER = 0.5, 0.8, 0.1
SHARED = 0.8


class Table:
    """Errors per seed and utterance of three systems; seeds of student and teacher are paired."""

    def __init__(self, rng: np.random.Generator, speakers: int, seeds: int, seed_effect: float) -> None:
        sizes = rng.multinomial(speakers * 12, np.full(speakers, 1 / speakers)) + 1
        self.units_N = np.repeat(np.arange(speakers), sizes)
        num = self.units_N.size
        self.words_RN = np.tile(rng.integers(3, 12, size=num), (seeds, 1)).astype(float)
        common_N = SPEAKERS * rng.normal(size=speakers)[self.units_N] + UTTERANCES * rng.normal(size=num)
        luck_R = rng.normal(size=seeds)  # what a student has of its teacher's seed
        self.errors: dict[str, Array] = {}
        self.rates: dict[str, Estimate] = {}
        for system, mean in MEANS.items():
            own_N = SPEAKERS * rng.normal(size=speakers)[self.units_N] + UTTERANCES * rng.normal(size=num)
            seed_R = rng.normal(size=seeds)
            if system != "baseline":
                seed_R = math.sqrt(0.7) * luck_R + math.sqrt(0.3) * seed_R
            together_RN = TOGETHER * rng.normal(size=(seeds, speakers))[:, self.units_N]
            hard_N = math.sqrt(SHARED) * common_N + math.sqrt(1 - SHARED) * own_N
            odds_RN = mean + hard_N + seed_effect * seed_R[:, None] + together_RN
            errors = rng.binomial(self.words_RN.astype(int), 1 / (1 + np.exp(-odds_RN))).astype(float)
            key = "alone" if system == "baseline" else "paired"
            self.errors[system] = errors
            self.rates[system] = rate(errors, self.words_RN, self.units_N, key)


def truth(seed_effect: float) -> dict[str, float]:
    """Rates over all speakers, utterances and seeds, by Gauss-Hermite quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = math.sqrt(SPEAKERS**2 + UTTERANCES**2 + TOGETHER**2 + seed_effect**2)
    return {
        system: float(weights @ (1 / (1 + np.exp(-(mean + spread * x)))) / weights.sum())
        for system, mean in MEANS.items()
    }


def coverage(
    speakers: int, seeds: int, seed_effect: float, intervals: Callable[[Table, int], dict[str, list[float]]]
) -> dict[str, float]:
    """Share of simulated tables whose intervals hold the truth."""
    rng, true = np.random.default_rng(100 * speakers + seeds), truth(seed_effect)
    student, baseline, teacher = (true[name] for name in ("student", "baseline", "teacher"))
    expected = {
        "wer": student,
        "difference": student - baseline,
        "paired": student - teacher,
        "gap": (baseline - student) / (baseline - teacher),
    }
    held = dict.fromkeys(expected, 0)
    given = dict.fromkeys(expected, 0)
    for number in range(TABLES):
        table = Table(rng, speakers, seeds, seed_effect)
        for name, (low, high) in intervals(table, number).items():
            given[name] += 1
            held[name] += low <= expected[name] <= high
    return {name: held[name] / given[name] for name in expected if given[name] >= 0.5 * TABLES}


def ours(table: Table, number: int) -> dict[str, list[float]]:
    student, baseline, teacher = (table.rates[name] for name in ("student", "baseline", "teacher"))
    found = {
        "wer": student.positive_interval(),
        "difference": (student - baseline).interval(),
        "paired": (student - teacher).interval(),
    }
    return {name: pair for name, pair in found.items() if pair is not None}


def gap(table: Table, number: int) -> dict[str, list[float]]:
    student, baseline, teacher = (table.rates[name] for name in ("student", "baseline", "teacher"))
    found = quotient_interval(baseline - student, baseline - teacher)
    return {} if found is None else {"gap": found}


def utterances_alone(table: Table, number: int) -> dict[str, list[float]]:
    """The bootstrap over utterances of errors averaged over seeds (Bisani & Ney 2004)."""
    rng = np.random.default_rng(number)
    num = table.units_N.size
    times_BN = rng.multinomial(num, np.full(num, 1 / num), size=300)
    return _percentiles(
        table, {name: times_BN @ e.mean(axis=0) for name, e in table.errors.items()}, times_BN
    )


def hierarchical_bootstrap(table: Table, number: int) -> dict[str, list[float]]:
    """Speakers, utterances within them and seeds, all drawn with replacement; percentiles."""
    rng = np.random.default_rng(number)
    members = [np.flatnonzero(table.units_N == s) for s in range(table.units_N.max() + 1)]
    num_seeds, num = table.words_RN.shape
    times_BN = np.zeros((300, num))
    times_BS = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=300)
    for mine, times_B in zip(
        members, times_BS.T, strict=True
    ):  # a speaker drawn twice says other things twice
        times_BN[:, mine] = rng.multinomial(times_B * mine.size, np.full(mine.size, 1 / mine.size))
    drawn = {
        key: rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=300) / num_seeds
        for key in ("alone", "paired")
    }
    sums = {}
    for name, errors_RN in table.errors.items():
        seeds_BR = drawn["alone" if name == "baseline" else "paired"]
        sums[name] = ((times_BN @ errors_RN.T) * seeds_BR).sum(axis=1)
    return _percentiles(table, sums, times_BN)


def _percentiles(table: Table, sums: dict[str, Array], times_BN: Array) -> dict[str, list[float]]:
    of = {name: errors / (times_BN @ table.words_RN[0]) for name, errors in sums.items()}
    figures = {
        "wer": of["student"],
        "difference": of["student"] - of["baseline"],
        "paired": of["student"] - of["teacher"],
    }
    return {name: list(np.percentile(found, [2.5, 97.5])) for name, found in figures.items()}


# ---------------------------------------------------------------- coverage


@pytest.mark.parametrize("seed_effect", [0.05, 0.3])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("speakers", [8, 20])
def test_the_interval_covers_the_truth(speakers: int, seeds: int, seed_effect: float) -> None:
    found = coverage(speakers, seeds, seed_effect, ours)
    assert {"wer", "difference", "paired"} <= found.keys()
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


def test_the_interval_of_the_gap_covers_the_truth() -> None:
    found = coverage(20, 5, 0.05, gap)
    assert 0.92 <= found["gap"] <= 0.98, found


@pytest.mark.parametrize(("speakers", "seeds"), [(8, 3), (20, 5)])
def test_utterances_alone_do_not(speakers: int, seeds: int) -> None:
    for seed_effect, most in ((0.05, 0.85), (0.3, 0.75)):
        found = coverage(speakers, seeds, seed_effect, utterances_alone)
        assert all(share < most for share in found.values()), found


def test_nor_does_a_hierarchical_bootstrap() -> None:
    """Too wide where seeds hardly matter (it counts variance twice), too narrow where they do."""
    assert coverage(8, 3, 0.05, hierarchical_bootstrap)["difference"] > 0.98
    found = coverage(8, 3, 0.6, hierarchical_bootstrap)
    assert max(found["wer"], found["difference"]) < 0.9, found
    assert coverage(8, 3, 0.6, ours)["difference"] >= 0.92


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(TABLES):
        one, other = (Table(rng, 8, 3, 0.3).rates["student"] for _ in range(2))
        p_values.append((one - Estimate({"other": other.parts["paired"]})).p_value())
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


# ---------------------------------------------------------------- by construction


def one_rate(errors_RN: Array, units_N: NDArray[np.intp], key: str = "a") -> Estimate:
    return rate(errors_RN, np.full(errors_RN.shape, 10.0), units_N, key)


def test_the_standard_error_of_a_mean() -> None:
    """A single model, units of one utterance of the same length each: that of any textbook."""
    errors_N = np.random.default_rng(0).binomial(10, 0.3, size=40).astype(float)
    found = one_rate(errors_N[None], np.arange(40))
    error, freedom = found.standard_error()
    assert error == pytest.approx(np.std(errors_N / 10, ddof=1) / math.sqrt(40))
    assert freedom == pytest.approx(39)
    assert found.interval() == pytest.approx(
        [found.value - 2.0227 * error, found.value + 2.0227 * error], 1e-4
    )
    low, high = found.positive_interval() or [0.0, 0.0]
    assert low * high == pytest.approx(found.value**2), "symmetric in the logarithm"


def test_the_standard_error_between_seeds() -> None:
    """Utterances all alike: only seeds vary, paired ones by their differences."""
    a_R, b_R = np.array([1.0, 2.0, 4.0]), np.array([2.0, 3.5, 5.0])
    a, b, c = (
        one_rate(np.repeat(x[:, None], 30, axis=1), np.arange(30), key)
        for x, key in ((a_R, "a"), (b_R, "a"), (b_R, "c"))
    )
    paired, crossed = (a - b).standard_error(), (a - c).standard_error()
    assert paired == pytest.approx((np.std(a_R - b_R, ddof=1) / math.sqrt(3) / 10, 2))
    assert crossed[0] == pytest.approx(math.sqrt((a_R.var(ddof=1) + b_R.var(ddof=1)) / 3) / 10)
    assert 2 < crossed[1] < 4, "Welch's degrees of freedom"
    assert (a - b).p_value() < (a - c).p_value()


def test_two_seeds_are_left_out() -> None:
    errors_RN = np.array([[1.0, 2, 3, 2], [4.0, 5, 6, 5]])
    mean = one_rate(errors_RN.mean(axis=0)[None], np.arange(4))
    assert one_rate(errors_RN, np.arange(4)).interval() == pytest.approx(mean.interval())


def test_speakers_who_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    errors_N = rng.binomial(10, np.repeat(rng.uniform(0.05, 0.6, size=10), 20)).astype(float)
    widths = []
    for units_N in (np.arange(200), np.arange(200) // 20):
        low, high = one_rate(errors_N[None], units_N).interval() or [0.0, 0.0]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_seeds_that_are_far_apart_show_nothing() -> None:
    """99 utterances by 8 speakers, three seeds from 52 to 80 % against three from 84 to 88 %."""
    rng = np.random.default_rng(4)

    def say(rates: list[float], key: str) -> Estimate:
        return one_rate(rng.binomial(10, np.array(rates)[:, None], size=(3, 99)), np.arange(99) % 8, key)

    difference = say([0.52, 0.66, 0.80], "a") - say([0.84, 0.86, 0.88], "b")
    assert difference.p_value() > 0.05
    single = Estimate(
        {k: (v.mean(keepdims=True), i.mean(axis=0)[None]) for k, (v, i) in difference.parts.items()}
    )
    assert single.p_value() < 0.001, "of these models, it is clear"


def test_interval_and_p_value_agree() -> None:
    rng = np.random.default_rng(6)
    for _ in range(100):
        table = Table(rng, 8, 3, 0.1)
        difference = table.rates["student"] - table.rates["baseline"]
        low, high = difference.interval() or [0.0, 0.0]
        assert (difference.p_value() < 0.05) == (low > 0 or high < 0)


def test_what_says_nothing() -> None:
    one = one_rate(np.array([[1.0]]), np.array([0]))
    assert one.interval() is None
    assert one.p_value() == 1
    two = one_rate(np.array([[1.0, 3, 2]]), np.arange(3), "b")
    assert (two - two).p_value() == 1
    assert (two - two).interval() == [0, 0]
    always = one_rate(np.full((1, 5), 2.0), np.arange(5)) - one_rate(np.full((1, 5), 1.0), np.arange(5), "b")
    assert always.p_value() == 2**-4, "no variance: a sign test of five"
    assert quotient_interval(one, one) is None


def test_quotient_of_proportional_figures_is_exact() -> None:
    table = Table(np.random.default_rng(1), 20, 3, 0.1)
    gap = table.rates["baseline"] - table.rates["teacher"]
    assert quotient_interval(0.5 * gap, gap) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert quotient_interval(gap, -1.0 * gap) is None, "not above 0"


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (2.5, 3.5746), (7, 2.3646), (30, 2.0423), (2599, 1.9609), (1e5, 1.96)],
)
def test_students_distribution(freedom: float, quantile: float) -> None:
    """Tables of Student's t; 2.5 degrees of freedom by integration of the density."""
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, rel=2e-3)
    assert t_p_value(quantile, freedom) == pytest.approx(0.05, rel=0.01)


def test_small_p_values() -> None:
    assert t_p_value(4, 30) == pytest.approx(3.818e-4, rel=0.01)
    assert t_p_value(4, 1e5) == pytest.approx(6.34e-5, rel=0.05)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_it_takes_seconds() -> None:
    """Ten systems of three seeds, 2600 utterances, all against all."""
    rng = np.random.default_rng(0)
    units_N = np.arange(2600) % 40
    start = time.process_time()
    rates = [one_rate(rng.binomial(10, 0.2, size=(3, 2600)), units_N, str(i)) for i in range(10)]
    for a in rates:
        a.positive_interval()
        assert all((a - b).p_value() <= 1 for b in rates)
    quotient_interval(rates[0] - rates[1], rates[0] - 0.5 * rates[2])
    assert time.process_time() - start < 3


def main() -> None:
    """Print the coverage that the documents quote: ``python tests/unit/test_intervals.py``."""
    kinds = {"ours": ours, "bootstrap": hierarchical_bootstrap, "utterances alone": utterances_alone}
    for kind, intervals in kinds.items():
        for speakers, seeds, effect in itertools.product((8, 20), (3, 5), (0.05, 0.3, 0.6)):
            found = coverage(speakers, seeds, effect, intervals)
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items())
            print(f"{kind}: {speakers} speakers, {seeds} seeds, effect {effect}: {shares}", flush=True)


if __name__ == "__main__":
    main()
