"""Audio of any length for models that want a few seconds: long audio is cut where it is quietest.

This file needs nothing but Python and numpy: the program of an export is made with a copy of it.
S samples, T frames of 0.01 s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

LONGEST_S = 30.0
"""Longest audio that is recognised as one, unless a caller says otherwise."""

SHORTEST_S = 0.025
"""One window of the features: in less there is nothing to recognise."""

HOP_S = 0.01
PAUSE_S = 0.5  # over so much of a pause its quietness counts, most in the middle
SILENT_POWER = 1e-9  # quieter is no quieter, -90 dB


def segments(
    blocks: Iterable[np.ndarray], sample_rate: int, longest_s: float = LONGEST_S
) -> Iterator[tuple[float, np.ndarray]]:
    """Audio in pieces that end in pauses: (start in seconds, samples (S,)), one after the other.

    What is below :data:`SHORTEST_S` is left out, so next to no audio has no piece and is no text. What is no
    longer than ``longest_s`` stays whole. Otherwise each piece ends where the second half of the
    next ``longest_s`` is quietest: a long pause rather than a short one. Memory holds a block and a piece.

    Args:
        blocks: of the audio, in order, of any lengths; where they end does not matter.
        sample_rate: in Hz.
        longest_s: of a piece; 1 at least.
    """
    longest = max(1.0 * sample_rate, longest_s * sample_rate)
    rest_S, start = np.zeros(0, dtype=np.float32), 0
    for block_S in blocks:
        rest_S = np.concatenate([rest_S, block_S]) if len(rest_S) else block_S
        while len(rest_S) > longest:
            cut = _quietest(rest_S[: int(longest)], sample_rate)
            yield start / sample_rate, rest_S[:cut]
            rest_S, start = rest_S[cut:], start + cut
    if len(rest_S) >= SHORTEST_S * sample_rate:
        yield start / sample_rate, rest_S


def joined(parts: Iterable[tuple[float, str, Sequence[Any], Sequence[float]]]) -> tuple[str, list, list]:
    """What was recognised in each segment, as of the whole: text, tokens, and the start of each.

    Args:
        parts: start of the segment in seconds, text, tokens, and their starts within the segment (or none).
    """
    whole = ""
    tokens: list[Any] = []
    times_s: list[float] = []
    for start_s, text, found, found_s in parts:
        space = " " if whole and text and not UNSPACED.search(whole[-1] + text[0]) else ""
        whole += space + text
        tokens += found
        times_s += [start_s + time_s for time_s in found_s]
    return whole, tokens, times_s


def _quietest(samples_S: np.ndarray, sample_rate: int) -> int:
    """The sample in the second half around which it is quietest; the last of equals."""
    hop = max(1, round(HOP_S * sample_rate))
    half = len(samples_S) // 2
    num_frames = (len(samples_S) - half) // hop
    width = min(round(PAUSE_S / HOP_S), num_frames // 2)
    if width < 1:
        return len(samples_S)
    frames_TH = samples_S[half : half + num_frames * hop].reshape(num_frames, hop)
    level_T = 10 * np.log10(frames_TH.var(axis=1) + SILENT_POWER)  # the variance: an offset is no sound
    around_T = np.convolve(level_T, np.hanning(width + 2)[1:-1], mode="valid")
    last = len(around_T) - 1 - int(around_T[::-1].argmin())
    return half + last * hop + width * hop // 2
