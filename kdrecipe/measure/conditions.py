"""What devices do to speech, done to test utterances: whether a model knows more than how its corpus is cut.

Each condition keeps the words, so that the error rate should stay that of the clean utterances. S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kdrecipe.corpus.acoustics import NOISES, add_noise
from kdrecipe.corpus.audio import Utterance
from kdrecipe.interfaces import SAMPLE_RATE


def _silence(utterances: Sequence[Utterance]) -> list[Utterance]:
    zeros_S = np.zeros(2 * SAMPLE_RATE, np.float32)
    return [replace(u, samples_S=np.concatenate([zeros_S, u.samples_S, zeros_S])) for u in utterances]


def _joined(limit_s: float) -> Callable[[Sequence[Utterance]], list[Utterance]]:
    """Utterances in a row that last ``limit_s`` at least, but for the last row."""

    def join(utterances: Sequence[Utterance]) -> list[Utterance]:
        rows: list[list[Utterance]] = [[]]
        for utterance in utterances:
            if sum(u.duration_s for u in rows[-1]) >= limit_s:
                rows.append([])
            rows[-1].append(utterance)
        return [
            Utterance(
                "+".join(u.id for u in row),
                np.concatenate([u.samples_S for u in row]),
                " ".join(u.text for u in row),
            )
            for row in rows
        ]

    return join


def _gain(db: float) -> Callable[[Sequence[Utterance]], list[Utterance]]:
    """Another level; not clipped, so that it is the level alone that differs."""
    factor = np.float32(10 ** (db / 20))
    return lambda utterances: [replace(u, samples_S=u.samples_S * factor) for u in utterances]


def _noise(snr_db: float) -> Callable[[Sequence[Utterance]], list[Utterance]]:
    """Noise of all kinds in turn, the same for every system."""
    names = sorted(NOISES)

    def add(utterances: Sequence[Utterance]) -> list[Utterance]:
        noisy = []
        for number, utterance in enumerate(utterances):
            noise_S = NOISES[names[number % len(names)]](
                len(utterance.samples_S), np.random.default_rng(number)
            )
            samples_S = add_noise(utterance.samples_S, noise_S, snr_db).astype(np.float32)
            noisy.append(replace(utterance, samples_S=samples_S))
        return noisy

    return add


@dataclass(frozen=True)
class Condition:
    """One of them.

    Args:
        title: in words.
        apply: from utterances, those of a speaker in a row, to what is recognised instead.
    """

    title: str
    apply: Callable[[Sequence[Utterance]], list[Utterance]]


CONDITIONS = {
    "clean": Condition("as recorded", list),
    "silence": Condition("2 s of silence before and after", _silence),
    "joined_10s": Condition("joined to 10 s", _joined(10.0)),
    "joined_30s": Condition("joined to 30 s", _joined(30.0)),
    "quieter": Condition("20 dB quieter", _gain(-20.0)),
    "louder": Condition("20 dB louder", _gain(20.0)),
    "noise": Condition("noise at 10 dB", _noise(10.0)),
}
"""By name; the first is what the others are compared with."""
