"""Rooms and noises made of random numbers, for synthesised speech. All at 16 kHz, float64 (S,)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kdrecipe.interfaces import SAMPLE_RATE


def resample(samples_S: np.ndarray, ratio_up: int, ratio_down: int) -> np.ndarray:
    """Change the sampling rate by ``ratio_up / ratio_down``, band-limited, in the frequency domain.

    The length becomes that of the input, padded to a multiple of ``ratio_down``, times the ratio.
    Quick for ratios of small prime factors.
    """
    num_blocks = -(-len(samples_S) // ratio_down)
    length, new_length = num_blocks * ratio_down, num_blocks * ratio_up
    spectrum = np.fft.rfft(samples_S, length)
    kept = np.zeros(new_length // 2 + 1, dtype=complex)
    common = min(len(kept), len(spectrum))
    kept[:common] = spectrum[:common]
    return np.asarray(np.fft.irfft(kept, new_length) * (new_length / length))


def room(rng: np.random.Generator, rt60_s: float, direct_to_reverb_db: float) -> np.ndarray:
    """An impulse response: the direct sound, then noise that decays by 60 dB in ``rt60_s``."""
    num_samples = round(rt60_s * SAMPLE_RATE)
    time_s = np.arange(num_samples) / SAMPLE_RATE
    tail = rng.standard_normal(num_samples) * 10 ** (-3 * time_s / rt60_s)
    tail[: round(rng.uniform(0.002, 0.01) * SAMPLE_RATE)] = 0  # no wall is nearer than that
    tail *= np.sqrt(10 ** (-direct_to_reverb_db / 10) / np.sum(tail**2))
    tail[0] = 1.0
    return tail


def convolve(samples_S: np.ndarray, response: np.ndarray) -> np.ndarray:
    """``samples_S`` in the room, as long as before."""
    size = 1 << (len(samples_S) + len(response) - 2).bit_length()
    spectrum = np.fft.rfft(samples_S, size) * np.fft.rfft(response, size)
    return np.asarray(np.fft.irfft(spectrum, size)[: len(samples_S)])


def add_noise(
    speech_S: np.ndarray, noise_S: np.ndarray, snr_db: float, num_spoken: int | None = None
) -> np.ndarray:
    """Speech and noise, the noise scaled so that their mean powers are ``snr_db`` apart.

    Args:
        speech_S: speech, perhaps with silence around it.
        noise_S: as long.
        snr_db: the ratio.
        num_spoken: samples that are not silence, over which the mean of the speech is taken; None: all.
    """
    speech_power = np.sum(speech_S**2) / (num_spoken or len(speech_S))
    noise_power = np.mean(noise_S**2)
    if noise_power <= 0:
        return speech_S
    gain = float(np.sqrt(speech_power / noise_power * 10 ** (-snr_db / 10)))
    return np.asarray(speech_S + noise_S * gain)


def _coloured(num_samples: int, rng: np.random.Generator, slope: float) -> np.ndarray:
    """Noise whose power falls with frequency as f ** -slope above 50 Hz."""
    size = 1 << (num_samples - 1).bit_length()  # a power of two: other lengths can be slow to transform
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * np.maximum(frequency, 50.0) ** (-slope / 2), size)[:num_samples]


def _white(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(num_samples)


def _pink(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    return _coloured(num_samples, rng, 1.0)


def _rumble(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A car, a ventilator."""
    return _coloured(num_samples, rng, 2.5)


def _hum(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Mains and its harmonics, with some hiss."""
    time_s = np.arange(round(0.1 * SAMPLE_RATE)) / SAMPLE_RATE  # whole periods of both frequencies
    period = np.zeros(len(time_s))
    base = rng.choice([50.0, 60.0])
    for k in range(1, 12):
        period += rng.uniform(0.2, 1.0) / k * np.sin(2 * np.pi * (base * k * time_s + rng.uniform()))
    return np.resize(period, num_samples) + 0.1 * rng.standard_normal(num_samples)


def _crowd(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Speech-shaped noise that swells at the rate of syllables, twice over."""
    time_s = np.arange(num_samples) / SAMPLE_RATE
    total = np.zeros(num_samples)
    for _ in range(2):
        swell = np.sin(2 * np.pi * (rng.uniform(2, 5) * time_s + rng.uniform()))
        swell *= np.sin(2 * np.pi * (rng.uniform(0.3, 1) * time_s + rng.uniform()))
        total += _coloured(num_samples, rng, 1.5) * np.maximum(swell, 0)
    return total


def _clatter(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Dishes: now and then a short ringing, over a little pink noise."""
    total = _coloured(num_samples, rng, 1.0)
    total *= 0.1 / np.sqrt(np.mean(total**2))
    ring_s = np.arange(round(0.08 * SAMPLE_RATE)) / SAMPLE_RATE
    for _ in range(max(1, round(rng.uniform(2, 5) * num_samples / SAMPLE_RATE))):
        start = int(rng.integers(num_samples))
        ring = np.sin(2 * np.pi * rng.uniform(1000, 5000) * ring_s) * np.exp(
            -ring_s / rng.uniform(0.01, 0.03)
        )
        piece = total[start : start + len(ring)]
        piece += rng.uniform(0.3, 1.0) * ring[: len(piece)]
    return total


NOISES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "white": _white,
    "pink": _pink,
    "rumble": _rumble,
    "hum": _hum,
    "crowd": _crowd,
    "clatter": _clatter,
}
"""By name: ``noise(num_samples, rng)``, of any level."""
