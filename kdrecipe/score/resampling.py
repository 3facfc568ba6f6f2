"""Intervals and tests by resampling utterances: what a test set of this size can tell.

Shapes: N utterances (or any sampling unit), C columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK_CELLS = 4_000_000  # random numbers drawn at once: bounds memory to about 100 MB


def resampled_sums(
    columns: Mapping[Any, Array],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[Any, Array]:
    """Bootstrap: each column's sum over N utterances drawn with replacement, R times over.

    All columns see the same draws, so that differences and ratios between them are paired.

    Args:
        columns: name -> (N,) figures per utterance (errors, lengths, ...), all in the same order.
        groups: per utterance, what it belongs to (its speaker): whole groups are then drawn.
        resamples: R.
        seed: same seed, same draws.

    Returns:
        name -> (R,) sums.

    Reference: Bisani & Ney, Bootstrap estimates for confidence intervals in ASR performance
    evaluation, ICASSP 2004.
    """
    table_NC = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)
    if groups is not None:
        _, rows_N = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
        grouped = np.zeros((int(rows_N.max()) + 1, table_NC.shape[1]))
        np.add.at(grouped, rows_N, table_NC)
        table_NC = grouped
    num_units = table_NC.shape[0]
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_CELLS // num_units))
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(num_units, size=(size, num_units))
        cells = drawn + num_units * np.arange(size)[:, None]
        times_RN = np.bincount(cells.ravel(), minlength=size * num_units).reshape(size, num_units)
        parts.append(times_RN.astype(np.float64) @ table_NC)
    sums_RC = np.concatenate(parts)
    return {name: sums_RC[:, i] for i, name in enumerate(columns)}


def interval(samples_R: Array, level: float = 0.95) -> list[float] | None:
    """Percentile interval ``[lo, hi]``; None if any part of it is undefined (0 / 0)."""
    finite = samples_R[np.isfinite(samples_R)]
    if finite.size < samples_R.size * (1 + level) / 2:
        return None
    tail = 50 * (1 - level)
    lo, hi = np.percentile(finite, [tail, 100 - tail])
    return [float(lo), float(hi)]


def sign_flip_p(differences_N: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value that paired differences of this sum arise when neither side is better.

    If neither is better, each utterance's difference is as likely with the opposite sign. The
    p-value is the share of random sign changes whose sum is at least as far from 0; identical
    sides give 1, and no p-value is below 1 / (R + 1).

    This is the matched-pairs comparison of Gillick & Cox, Some statistical issues in the
    comparison of speech recognition algorithms, ICASSP 1989, with utterances for segments and
    a permutation distribution in place of the normal one.
    """
    differences = np.asarray(differences_N, dtype=np.float64)
    differences = differences[differences != 0]
    if differences.size == 0:
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-9)  # sums in another order differ in the last digit
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_CELLS // differences.size))
    extreme = 0
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        signs = rng.integers(0, 2, size=(size, differences.size)).astype(np.float64) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values made stricter for their number: the chance of even one false alarm stays bounded.

    Reference: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
