"""Intervals and tests for error rates: how far other speakers, utterances and seeds would move them.

A test set has speakers with their utterances; a system has models of several seeds. Every model
recognises every utterance, so seeds and speakers are crossed. Each adds a part to the variance of a
figure, which is estimated from mean squares (method of moments). The interval is Student's t with
Satterthwaite's degrees of freedom, so it is wider with few speakers or seeds.

A hierarchical bootstrap (draw speakers, utterances within them, and, crossed with these, seeds)
estimates the same variance, with known errors. If each level is drawn with replacement, the variance
of utterances within speakers counts twice (Davison & Hinkley, Bootstrap methods and their application,
1997, section 3.8) and the joint variance of seeds and speakers three times (Owen, The pigeonhole
bootstrap, Annals of Applied Statistics 1, 2007); no way of drawing corrects that (McCullagh,
Resampling and exchangeable arrays, Bernoulli 6, 2000). The variance between n seeds comes out too
small by the factor (n - 1) / n, and percentiles treat it as known, although 3 seeds require 4.30 standard
errors instead of 1.96. ``tests/unit/test_intervals.py`` measures the coverage of both.

Shapes: N utterances, U sampling units (speakers, or utterances where speakers are not known), R seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
MIN_SEEDS = 3  # with fewer, the variance between seeds is not estimated: t for 1 degree of freedom is 12.7
MIN_SPEAKERS = 3
_TINY = 1e-12  # rates closer than this differ only by the order of additions
_ANGLES = np.linspace(0, math.pi / 2, 5001)
_LOG_COS = np.log(np.cos(_ANGLES))


@dataclass(frozen=True)
class Estimate:
    """A figure averaged over seeds, with what its interval needs.

    Estimates of the same test set can be added, subtracted and scaled. Each has the contribution of
    every speaker, so the result is paired over speakers and utterances. Parts with the same key are
    paired over seeds; those with different keys are independent.

    Args:
        parts: key of a set of seeds -> (values (R,), one per seed; influences (R, U), how much
            each sampling unit moves them; each row adds up to 0). The figure is the sum over parts of
            the mean over seeds.
    """

    parts: Mapping[Hashable, tuple[Array, Array]]

    def __add__(self, other: Estimate) -> Estimate:
        parts = dict(self.parts)
        for key, (values_R, influences_RU) in other.parts.items():
            mine_R, mine_RU = parts.get(key, (0.0, 0.0))
            parts[key] = (mine_R + values_R, mine_RU + influences_RU)
        return Estimate(parts)

    def __sub__(self, other: Estimate) -> Estimate:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Estimate:
        return Estimate({key: (factor * v, factor * i) for key, (v, i) in self.parts.items()})

    @property
    def value(self) -> float:
        """The figure itself."""
        return float(sum(values_R.mean() for values_R, _ in self.parts.values()))

    def standard_error(self) -> tuple[float, float]:
        """Its standard error and that error's degrees of freedom, which are 0 with a single unit.

        There are three kinds of mean squares, each divided by the number of items that it averages
        over: between units, V_u; and, for each set of ``MIN_SEEDS`` seeds or more, between seeds,
        V_s, and of units and seeds together, V_us. V_u and V_s both contain V_us, so

            V = V_u + sum of max(V_s - V_us, 0).

        Degrees of freedom: V^2 over the sum of (part)^2 / (its degrees of freedom), and never
        less than the fewest of any part.

        Reference: the quasi-F of two crossed random factors, Clark, The language-as-fixed-effect
        fallacy, J. Verbal Learning and Verbal Behavior 12, 1973; degrees of freedom: Satterthwaite,
        An approximate distribution of estimates of variance components, Biometrics Bulletin 2,
        1946. Units are whole speakers, since the variance between totals of speakers contains that
        of their utterances (Rao & Wu, Resampling inference with complex survey data, JASA 83, 1988).
        """
        between_U = np.sum([influences_RU.mean(axis=0) for _, influences_RU in self.parts.values()], axis=0)
        if between_U.size < 2:
            return 0.0, 0.0
        num_units = between_U.size
        unbiased = num_units / (num_units - 1)
        variance = unbiased * float(between_U @ between_U)
        terms = [(variance, num_units - 1)]  # (variance, degrees of freedom) of each part
        for values_R, influences_RU in self.parts.values():
            free = values_R.size - 1
            if values_R.size < MIN_SEEDS:
                continue
            seeds = float(values_R.var(ddof=1)) / values_R.size
            together_RU = influences_RU - influences_RU.mean(axis=0)
            both = unbiased * float((together_RU**2).sum()) / (values_R.size * free)
            if seeds > both:
                variance += seeds - both
                terms += [(seeds, free), (both, free * (num_units - 1))]
        if variance <= _TINY**2:
            return 0.0, float(num_units - 1)
        freedom = variance**2 / sum(part**2 / free for part, free in terms)
        return math.sqrt(variance), max(freedom, min(free for _, free in terms))

    def interval(self, level: float = LEVEL) -> list[float] | None:
        """``[low, high]``; None with a single sampling unit, which says nothing about others."""
        error, freedom = self.standard_error()
        if not freedom:
            return None
        reach = t_quantile(level, freedom) * error
        return [self.value - reach, self.value + reach]

    def positive_interval(self, level: float = LEVEL) -> list[float] | None:
        """The same for a figure that is never below 0, such as a rate: symmetric in its logarithm.

        A rate that is low by chance also has a small standard error, so a symmetric interval would
        miss the truth more often above than below. It could also reach below 0.
        """
        pair, value = self.interval(level), self.value
        if pair is None or value <= 0:
            return pair
        factor = math.exp((pair[1] - value) / value)
        return [value / factor, value * factor]

    def p_value(self) -> float:
        """Two-sided p-value that the figure is 0; below 0.05 exactly if the 95 % interval excludes 0.

        If all units agree to the last digit, there is no standard error, and p is that of a sign
        test, 2^(1 - U). A single unit gives 1.
        """
        error, freedom = self.standard_error()
        if abs(self.value) <= _TINY or not freedom:
            return 1.0
        return t_p_value(abs(self.value) / error, freedom) if error else 2.0**-freedom


def rate(over_RN: Array, under_RN: Array, units_N: NDArray[np.intp], key: Hashable) -> Estimate:
    """A ratio of sums over utterances, such as errors over words, for each seed of a system.

    Args:
        over_RN: numerator (errors) per seed and utterance.
        under_RN: denominator (words); its sum is above 0 for each seed.
        units_N: number of each utterance's sampling unit, from 0 without gaps.
        key: that of the set of seeds, see :class:`Estimate`.

    Reference: linearisation of a ratio, e.g. Davison & Hinkley, Bootstrap methods and their
    application, 1997, section 2.7.2.
    """
    sums_R = under_RN.sum(axis=1)
    values_R = over_RN.sum(axis=1) / sums_R
    moved_RN = (over_RN - values_R[:, None] * under_RN) / sums_R[:, None]
    num_units = int(units_N.max()) + 1
    rows = [np.bincount(units_N, weights=moved_N, minlength=num_units) for moved_N in moved_RN]
    return Estimate({key: (values_R, np.array(rows))})


def quotient_interval(over: Estimate, under: Estimate, level: float = LEVEL) -> list[float] | None:
    """Interval of a quotient of figures: all q for which the interval of ``over - q * under`` includes 0.

    None if the interval of ``under`` reaches 0: the quotient can then be anything.

    Reference: Fieller, Some problems in interval estimation, J. R. Statistical Society B 16, 1954.
    """
    least = under.interval(level)
    if least is None or least[0] <= 0:
        return None

    def excluded(quotient: float) -> bool:
        rest = over - quotient * under
        found = rest.interval(level)
        return found is None or abs(rest.value) > max(found[1] - rest.value, _TINY)

    middle = over.value / under.value
    low, high = (_edge(excluded, middle, step) for step in (-1.0, 1.0))
    return None if low is None or high is None else [low, high]


def _edge(excluded: Callable[[float], bool], inside: float, step: float) -> float | None:
    """Where ``excluded`` becomes true on the way from ``inside`` in the direction of ``step``."""
    while not excluded(inside + step):
        if abs(step) > 1e6:
            return None
        step *= 2
    low, high = 0.0, step
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(inside + middle) else (middle, high)
    return inside + high


def t_quantile(level: float, freedom: float) -> float:
    """The t that Student's distribution stays below, in absolute value, with probability ``level``."""
    mass = _t_mass(freedom)
    return math.sqrt(freedom) * math.tan(float(np.interp(level, mass, _ANGLES)))


def t_p_value(t: float, freedom: float) -> float:
    """Probability that Student's distribution exceeds ``t`` in absolute value."""
    return 1 - float(np.interp(math.atan(t / math.sqrt(freedom)), _ANGLES, _t_mass(freedom)))


def _t_mass(freedom: float) -> Array:
    """P(|T| <= sqrt(freedom) tan x) for x on the grid: its density in x is cos(x)^(freedom - 1)."""
    density = np.exp((freedom - 1) * _LOG_COS)
    mass = np.cumsum(density[1:] + density[:-1])
    return np.concatenate([[0.0], mass / mass[-1]])


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that the chance of any false alarm stays bounded.

    Reference: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
