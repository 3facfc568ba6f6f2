"""Audio in memory: from files of any kind, from cuts, at the one sampling rate models know.

Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdrecipe.errors import DataError
from kdrecipe.interfaces import SAMPLE_RATE

if TYPE_CHECKING:
    from lhotse.cut import Cut


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


def read_audio(path: Path | str) -> tuple[np.ndarray, int]:
    """Samples (S,) float32 in [-1, 1], channels averaged, and their sampling rate.

    Reads what libsndfile reads: WAV, FLAC, Ogg, MP3, NIST SPHERE and more.

    Raises:
        DataError: no such file, not audio, or no samples in it.
    """
    import soundfile

    if not Path(path).is_file():
        raise DataError("there is no such file", where=str(path))
    try:
        samples_SC, sample_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(
            f"can't be read as audio: {error}",
            where=str(path),
            remedy="convert it to WAV first, e.g. ffmpeg -i in.m4a -ar 16000 -ac 1 out.wav",
        ) from None
    if len(samples_SC) == 0:
        raise DataError("there is no sound in it (0 samples)", where=str(path))
    return samples_SC.mean(axis=1), int(sample_rate)


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
