"""Folders of audio files, one folder per split; ``call.txt`` beside ``call.wav`` is its transcript.

A file of ``train`` without a transcript, such as a whole telephone call, becomes utterances without one:
each channel by itself, cut where it is quietest. Students learn from them what a teacher says there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from kdrecipe import hookimpl
from kdrecipe.corpus.audio_checks import SILENCE
from kdrecipe.corpus.gather import reason
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.corpus.segments import segments
from kdrecipe.errors import DataError
from kdrecipe.interfaces import SAMPLE_RATE, Options, Prepared
from kdrecipe.text import clean

if TYPE_CHECKING:
    from lhotse.audio import Recording
    from lhotse.supervision import SupervisionSegment

AUDIO = (".flac", ".mp3", ".ogg", ".wav")
TRAIN = "train"
BLOCK_S = 10  # of a file are decoded at once


class Folders:
    """Corpus ``folders``."""

    class Config(Options):
        """Options of the corpus.

        Args:
            splits: split -> its folder within the root; one that is not there is left out, but not ``train``.
            channel: of files with several, listen to this one alone; null: files without a transcript give
                all of them, each by itself.
            longest_s: longest utterance that a file without a transcript is cut into, seconds.
        """

        splits: dict[str, str] = {"train": "train", "dev": "dev", "test": "test"}
        channel: int | None = Field(default=None, ge=0)
        longest_s: float = Field(default=20.0, ge=1, le=30)

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Manifests of each split; audio of other sampling rates is brought to 16 kHz while it is read.

        Raises:
            DataError: the folder of ``train`` is not there, or one is without audio.
        """
        from lhotse.audio import RecordingSet
        from lhotse.supervision import SupervisionSet

        prepared = Prepared({})
        for split, name in self.config.splits.items():
            folder = (corpus_dir or Path()) / name
            if split != TRAIN and not folder.is_dir():
                continue
            recordings: list[Recording] = []
            utterances: list[SupervisionSegment] = []
            num_cut = 0
            for path in _audio_in(folder, split):
                where = str(path)
                try:
                    text = _transcript(path)
                    recording = _recording(path, f"{split}-{_name(path, folder)}")
                    cut = split == TRAIN and text is None
                    pieces = self._cut(path, recording) if cut else [self._whole(recording)]
                except UnicodeDecodeError:
                    where = str(path.with_suffix(".txt"))
                    prepared.problems.append(DataProblem("", where, kind="not_utf8", id=where))
                    continue
                except (OSError, RuntimeError) as error:
                    problem = DataProblem(reason(error), where, kind="undecodable", id=where)
                    prepared.problems.append(problem)
                    continue
                num_cut += cut
                recordings.append(recording)
                utterances += _utterances(path, folder, recording, pieces, text or "")
            if num_cut:
                num = sum(not utterance.text for utterance in utterances)
                prepared.notes.append(
                    f"{num_cut} files of {split} have no transcript and were cut into {num} utterances"
                )
            prepared.splits[split] = (
                RecordingSet.from_recordings(recordings),
                SupervisionSet.from_segments(utterances),
            )
        return prepared

    def _whole(self, recording: Recording) -> Piece:
        """All of a file, as one utterance; of several channels it must be said which."""
        there = list(recording.sources[0].channels)
        one = there[0] if len(there) == 1 else self.config.channel
        return (there if one is None else one), 0.0, recording.duration

    def _cut(self, path: Path, recording: Recording) -> list[Piece]:
        """The utterances of a file, channel by channel, without those in which nothing sounds."""
        channel, *_ = whole = self._whole(recording)
        wanted = channel if isinstance(channel, list) else [channel]
        if not set(wanted) <= set(recording.sources[0].channels):
            return [whole]  # validation says what is wrong with it
        pieces: list[Piece] = []
        for number in wanted:
            rate, blocks = _blocks(path, number)
            for start_s, samples_S in segments(blocks, rate, self.config.longest_s):
                if float(np.ptp(samples_S)) >= SILENCE:
                    pieces.append((number, start_s, len(samples_S) / rate))
        return pieces


Piece = tuple[Any, float, float]
"""A channel (several: nobody has chosen yet), start and duration in seconds."""


def _audio_in(folder: Path, split: str) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
    if not found:
        raise DataError(
            f"there is no audio for {split}",
            where=str(folder),
            remedy=f"put it there ({', '.join(AUDIO)}), or name its folder with corpus.splits",
        )
    return found


def _name(path: Path, folder: Path) -> str:
    return "-".join(path.relative_to(folder).with_suffix("").parts)


def _transcript(path: Path) -> str | None:
    """What is in the text file beside the audio; None if there is none."""
    beside = path.with_suffix(".txt")
    return clean(beside.read_text(encoding="utf-8-sig")) if beside.is_file() else None


def _recording(path: Path, recording_id: str) -> Recording:
    """By the file's header; RuntimeError if it is no audio."""
    import soundfile
    from lhotse.audio import AudioSource, Recording

    info = soundfile.info(str(path))
    source = AudioSource(type="file", channels=list(range(info.channels)), source=str(path.absolute()))
    recording = Recording(recording_id, [source], info.samplerate, info.frames, info.frames / info.samplerate)
    return recording if info.samplerate == SAMPLE_RATE else recording.resample(SAMPLE_RATE)


def _blocks(path: Path, channel: int) -> tuple[int, Iterator[np.ndarray]]:
    """Sampling rate, and one channel's samples, some seconds at a time."""
    import soundfile

    file = soundfile.SoundFile(str(path))
    size = BLOCK_S * file.samplerate
    return file.samplerate, (b[:, channel] for b in file.blocks(size, dtype="float32", always_2d=True))


def _utterances(
    path: Path, folder: Path, recording: Recording, pieces: Sequence[Piece], text: str
) -> Iterator[SupervisionSegment]:
    """Speakers are folders within that of the split, else each file, or side of it, is somebody else."""
    from lhotse.supervision import SupervisionSegment

    several = len(recording.sources[0].channels) > 1
    for channel, start_s, duration_s in pieces:
        side = f"-{channel}" if several and isinstance(channel, int) else ""
        part = "" if duration_s == recording.duration else f"-{round(1000 * start_s):08d}"
        yield SupervisionSegment(
            id=f"{recording.id}{side}{part}",
            recording_id=recording.id,
            start=start_s,
            duration=duration_s,
            channel=channel,
            text=text,
            speaker=path.parent.name if path.parent != folder else f"{recording.id}{side}",
        )


@hookimpl
def register_corpora(register: Callable[[str, type], None]) -> None:
    register("folders", Folders)
