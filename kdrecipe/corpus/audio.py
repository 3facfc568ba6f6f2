"""Audio in memory: from files of any kind, from cuts, at the one sampling rate models know.

Shapes: S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrecipe.corpus.segments import LONGEST_S, SHORTEST_S, joined, segments
from kdrecipe.errors import DataError
from kdrecipe.interfaces import SAMPLE_RATE, Hypothesis

if TYPE_CHECKING:
    from lhotse.cut import Cut

BLOCK_S = 10  # of a file are decoded at once
SILENT = 1e-9  # power that is no sound
CANCELLED = 0.01  # power of the channels' average, of that of the channels


@dataclass(frozen=True)
class Utterance:
    """A piece of speech to recognise.

    Args:
        id: of the cut, or the file's name.
        samples_S: float32 in [-1, 1], one channel, 16 kHz.
        text: what is said; empty if unknown.
    """

    id: str
    samples_S: np.ndarray
    text: str = ""

    @property
    def duration_s(self) -> float:
        """Its length in seconds."""
        return len(self.samples_S) / SAMPLE_RATE


def open_audio(path: Path | str, channel: int | None = None) -> tuple[int, Iterator[np.ndarray]]:
    """Sampling rate, and the samples as blocks (S,) float32 in [-1, 1] of a few seconds each.

    Reads what libsndfile reads: WAV, FLAC, Ogg, MP3, NIST SPHERE and more.

    Args:
        path: of the file.
        channel: the one to read, from 0; None: the average of all.

    Raises:
        DataError: no such file, not audio, or no such channel; and while blocks are read: a damaged file, no
            samples in it, some that are no numbers, or channels that cancel each other.
    """
    import soundfile

    where = str(path)
    if not Path(path).is_file():
        raise DataError("there is no such file", where=where)
    try:
        file = soundfile.SoundFile(where)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _undecodable(error, where) from None
    if channel is not None and not 0 <= channel < file.channels:
        there = ", ".join(map(str, range(file.channels)))
        raise DataError(f"there is no channel {channel}, there are: {there}", where=where)
    return int(file.samplerate), _blocks(file, channel, where)


def _blocks(file: Any, channel: int | None, where: str) -> Iterator[np.ndarray]:
    import soundfile

    with file:
        start, size = 0, BLOCK_S * file.samplerate
        while True:
            try:
                block_SC = file.read(size, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise _undecodable(error, where) from None
            if len(block_SC) == 0:
                break
            if not np.isfinite(block_SC).all():
                first = start + int((~np.isfinite(block_SC)).any(axis=1).argmax())
                at_s = first / file.samplerate
                raise DataError(
                    f"there are samples that are no numbers (NaN or infinite), the first at {at_s:.3f} s",
                    where=where,
                    remedy="make the file again",
                )
            yield _one_channel(block_SC, channel, where)
            start += len(block_SC)
    if start == 0:
        raise DataError("there is no sound in it (0 samples)", where=where)


def _one_channel(block_SC: np.ndarray, channel: int | None, where: str) -> np.ndarray:
    """(S,): a channel or the average of all."""
    if channel is not None or block_SC.shape[1] == 1:
        return np.ascontiguousarray(block_SC[:, channel or 0])
    mean_S: np.ndarray = block_SC.mean(axis=1)
    power = float((block_SC**2).mean())
    if power > SILENT and float((mean_S**2).mean()) < CANCELLED * power:
        raise DataError(
            "the channels cancel each other: their average is silence",
            where=where,
            remedy="choose one: kdrecipe transcribe --channel 0",
        )
    return mean_S


def _undecodable(error: Exception, where: str) -> DataError:
    return DataError(
        f"can't be read as audio: {error}",
        where=where,
        remedy="convert it to WAV first, e.g. ffmpeg -i in.m4a -ar 16000 -ac 1 out.wav",
    )


def read_audio(path: Path | str) -> tuple[np.ndarray, int]:
    """Samples (S,) float32 in [-1, 1], channels averaged, and their sampling rate; see :func:`open_audio`."""
    sample_rate, blocks = open_audio(path)
    return np.concatenate(list(blocks)), sample_rate


def recognise_long(
    recognise: Callable[[np.ndarray, int], Hypothesis],
    blocks: Iterable[np.ndarray],
    sample_rate: int,
    longest_s: float = LONGEST_S,
) -> Hypothesis:
    """What is said in audio of any length, with a model that is given no more than ``longest_s`` of it.

    Args:
        recognise: samples (S,) and their rate to a hypothesis.
        blocks: the audio, see :func:`kdrecipe.corpus.segments.segments`; ``[samples_S]`` if it is in memory.
        sample_rate: in Hz.
        longest_s: cut audio that is longer, where it is quietest.

    Returns:
        Of the whole: times count from its start, scores are summed, log-probabilities averaged over the
        tokens.
    """
    found = [
        (at_s, recognise(part_S, sample_rate)) for at_s, part_S in segments(blocks, sample_rate, longest_s)
    ]
    text, tokens, times_s = joined((at_s, h.text, h.tokens, h.times_s) for at_s, h in found)
    scores = [h.score for _, h in found if h.score is not None]
    means = [(h.avg_log_prob, len(h.tokens)) for _, h in found if h.avg_log_prob is not None and h.tokens]
    num_tokens = sum(num for _, num in means)
    return Hypothesis(
        text,
        tokens,
        times_s,
        sum(scores) if len(scores) == len(found) else None,
        sum(mean * num for mean, num in means) / num_tokens if num_tokens else None,
    )


def padded(samples_CS: np.ndarray, sample_rate: int) -> np.ndarray:
    """With zeros after it up to one window, since Lhotse computes no features of less."""
    missing = math.ceil(SHORTEST_S * sample_rate) - samples_CS.shape[1]
    return samples_CS if missing <= 0 else np.pad(samples_CS, ((0, 0), (0, missing)))


def resample(samples_S: np.ndarray, sample_rate: int) -> np.ndarray:
    """(S,) at ``sample_rate`` to (S',) float32 at 16 kHz."""
    if sample_rate == SAMPLE_RATE:
        return samples_S.astype(np.float32, copy=False)
    import torch
    import torchaudio

    wave_S = torch.from_numpy(np.ascontiguousarray(samples_S, dtype=np.float32))
    resampled: np.ndarray = torchaudio.functional.resample(wave_S, sample_rate, SAMPLE_RATE).numpy()
    return resampled


def utterances_from_cuts(cuts: Iterable[Cut]) -> Iterator[Utterance]:
    """The audio of cuts, each with its transcript, read as they are asked for."""
    for cut in cuts:
        samples_S = resample(np.asarray(cut.load_audio())[0], cut.sampling_rate)
        text = " ".join(s.text for s in cut.supervisions if s.text)
        yield Utterance(cut.id, samples_S, text)
