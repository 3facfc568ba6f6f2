"""Speech as devices hear it: silence around it, one utterance after the other, other levels, rooms, noise.

All of it is made from samples, anew each time that an utterance is heard. Utterances begin at whole frames of
the models' encoders, so that what a teacher said about each of them alone can be put where it belongs.

S samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdrecipe.corpus import acoustics
from kdrecipe.errors import DataError
from kdrecipe.interfaces import FRAME_SAMPLES, SAMPLE_RATE

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import Augment

Noise = Callable[[int, np.random.Generator], np.ndarray]
"""``noise(num_samples, rng)``: (S,) of any level."""

_SILENT = 1 / 3  # share of silences that are digital zeros, as in padding and before streams
_MADE_S = 20  # seconds of each noise
_LOWEST_DB = -80.0  # of full scale: the quietest room


@dataclass(frozen=True)
class Scene:
    """What a model hears of some utterances in a row.

    Args:
        samples_S: float32.
        frames: of each utterance: the feature frame at which it begins, and how many it has.
    """

    samples_S: np.ndarray
    frames: tuple[tuple[int, int], ...]


def num_frames(num_samples: int) -> int:
    """Feature frames of so many samples."""
    return (num_samples + FRAME_SAMPLES // 2) // FRAME_SAMPLES


class Augmenter:
    """Makes scenes of utterances.

    Args:
        options: the recipe's ``training.augment``.
        grid: feature frames to a frame of the encoders; utterances begin at multiples of it.
        noises: what noise is taken from; None: made noise of all kinds.
    """

    def __init__(self, options: Augment, grid: int, noises: Noise | None = None) -> None:
        self.options = options
        self.grid = grid
        self.noise = noises or made_noise

    def rows(self, durations_s: Sequence[float], rng: np.random.Generator) -> list[list[int]]:
        """Which utterances of a batch come in a row: all on their own, or all rows of about equal length.

        Args:
            durations_s: of the batch's utterances.
            rng: decides.

        Returns:
            Numbers of utterances; each in one row.
        """
        order = rng.permutation(len(durations_s)).tolist()
        longest_s = max(durations_s)
        if rng.random() >= self.options.join or longest_s >= self.options.join_s:
            return [[i] for i in range(len(durations_s))]
        limit_s = rng.uniform(longest_s, self.options.join_s)
        rows: list[list[int]] = [[]]
        for i in order:
            if rows[-1] and sum(durations_s[j] for j in rows[-1]) + durations_s[i] > limit_s:
                rows.append([])
            rows[-1].append(i)
        return rows

    def scenes(self, rows: Sequence[Sequence[np.ndarray]], rng: np.random.Generator) -> list[Scene]:
        """The utterances of each row, one after the other, with all that surrounds and covers them.

        If the batch has silence around its rows at all, they all end at the same time, so that none of its
        frames is padding.

        Args:
            rows: utterances, (S,) float32 each.
            rng: decides.
        """
        placed = [self._in_a_row(row, rng) for row in rows]
        lens = [starts[-1] + num_frames(len(row[-1])) for row, starts in zip(rows, placed, strict=True)]
        spare = [0] * len(rows)
        if rng.random() < self.options.silence:
            end = max(lens) + self._frames(rng.uniform(*self.options.silence_s))
            spare = [(end - length) // self.grid for length in lens]
        scenes = []
        for row, starts, silent in zip(rows, placed, spare, strict=True):
            before = int(rng.integers(silent + 1)) * self.grid
            after = silent * self.grid - before
            scenes.append(self._scene(row, [before + start for start in starts], after, rng))
        return scenes

    def _frames(self, seconds: float) -> int:
        """Feature frames, whole encoder frames of them."""
        return round(seconds * SAMPLE_RATE / FRAME_SAMPLES / self.grid) * self.grid

    def _in_a_row(self, utterances: Sequence[np.ndarray], rng: np.random.Generator) -> list[int]:
        """The feature frame at which each begins, the first at 0, with pauses of up to half a second."""
        starts = [0]
        for utterance in utterances[:-1]:
            end = starts[-1] + -(-len(utterance) // FRAME_SAMPLES)
            starts.append(-(-end // self.grid) * self.grid + self._frames(rng.uniform(0, 0.5)))
        return starts

    def _scene(
        self, utterances: Sequence[np.ndarray], starts: Sequence[int], after: int, rng: np.random.Generator
    ) -> Scene:
        options = self.options
        samples_S = self._placed(utterances, starts, after, rng)
        speech_power = sum(float(np.sum(u**2)) for u in utterances) / max(1, sum(map(len, utterances)))
        if rng.random() < options.reverb:
            response = acoustics.room(rng, rng.uniform(*options.rt60_s), rng.uniform(0, 15))
            samples_S = acoustics.convolve(samples_S, response)
        if rng.random() < options.noise:
            noise_S = self.noise(len(samples_S), rng)
            level = np.sqrt(speech_power) * 10 ** (-rng.uniform(*options.snr_db) / 20)
            samples_S = samples_S + at_level(noise_S, level)
        if rng.random() < options.gain:
            samples_S = samples_S * 10 ** (rng.uniform(*options.gain_db) / 20)
        lens = (num_frames(len(utterance)) for utterance in utterances)
        return Scene(np.asarray(samples_S, dtype=np.float32), tuple(zip(starts, lens, strict=True)))

    def _placed(
        self, utterances: Sequence[np.ndarray], starts: Sequence[int], after: int, rng: np.random.Generator
    ) -> np.ndarray:
        """The utterances where they begin, and silence of some kind where there is none of them."""
        end = starts[-1] * FRAME_SAMPLES + len(utterances[-1])
        samples_S = np.zeros(end + after * FRAME_SAMPLES, dtype=np.float32)
        spoken_S = np.zeros(len(samples_S), dtype=bool)
        for start, utterance in zip(starts, utterances, strict=True):
            where = slice(start * FRAME_SAMPLES, start * FRAME_SAMPLES + len(utterance))
            samples_S[where], spoken_S[where] = utterance, True
        if not spoken_S.all() and rng.random() >= _SILENT:
            floor_db = 20 * np.log10(max(_floor(utterances), 1e-5))
            level = 10 ** (rng.uniform(_LOWEST_DB, max(floor_db + 3, _LOWEST_DB)) / 20)
            samples_S = np.where(spoken_S, samples_S, at_level(self.noise(len(samples_S), rng), level))
        return samples_S


def at_level(noise_S: np.ndarray, level: float) -> np.ndarray:
    """``noise_S`` with ``level`` as its root mean square; digital silence stays that."""
    rms = float(np.sqrt(np.mean(np.square(noise_S, dtype=np.float64)))) if len(noise_S) else 0.0
    return noise_S * (level / rms) if rms > 0 else noise_S


def _floor(utterances: Sequence[np.ndarray]) -> float:
    """Root mean square of the quietest tenth of frames: the noise that the utterances bring along."""
    frames = [u[: len(u) // FRAME_SAMPLES * FRAME_SAMPLES] for u in utterances]
    powers = np.concatenate([np.mean(f.reshape(-1, FRAME_SAMPLES) ** 2, axis=1) for f in frames])
    return float(np.sqrt(np.quantile(powers, 0.1))) if len(powers) else 0.0


@functools.cache
def _made() -> list[np.ndarray]:
    """Noises of all kinds, three of each: made once, since that takes as long as features do."""
    rng = np.random.default_rng(0)
    kinds = (acoustics.NOISES[name] for name in sorted(acoustics.NOISES))
    return [make(_MADE_S * SAMPLE_RATE, rng).astype(np.float32) for make in kinds for _ in range(3)]


def made_noise(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A part of one of the noises of :mod:`kdrecipe.corpus.acoustics`, over and over if it is too short."""
    noise_S = _made()[int(rng.integers(len(_made())))]
    start = int(rng.integers(len(noise_S)))
    return np.take(noise_S, np.arange(start, start + num_samples), mode="wrap")


class NoiseFiles:
    """Noise from the audio files in a directory and below, such as MUSAN's (arXiv 1510.08484).

    Args:
        directory: of WAV or FLAC files at any sampling rate.

    Raises:
        DataError: there is no audio.
    """

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(p for p in directory.rglob("*") if p.suffix.lower() in (".wav", ".flac"))
        if not self._paths:
            raise DataError(
                "no WAV or FLAC files to take noise from",
                where=str(directory),
                remedy="let training.augment.noises name such a directory; without it, noise is made",
            )

    def __call__(self, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        """A part of one of the files, over and over if it is too short."""
        import soundfile

        from kdrecipe.corpus.audio import resample

        path = self._paths[int(rng.integers(len(self._paths)))]
        try:
            info = soundfile.info(str(path))
            wanted = -(-num_samples * info.samplerate // SAMPLE_RATE) + 1
            start = int(rng.integers(max(1, info.frames - wanted)))
            samples_SC, rate = soundfile.read(
                str(path), frames=wanted, start=start, dtype="float32", always_2d=True
            )
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise DataError(f"can't be read as audio: {error}", where=str(path)) from None
        if not len(samples_SC):
            raise DataError("there is no sound in it (0 samples)", where=str(path))
        return np.resize(resample(samples_SC[:, 0], rate), num_samples)
