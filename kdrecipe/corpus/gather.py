"""Manifests of a corpus that is a list of audio files with their text: helpers for corpus plugins."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdrecipe.corpus.problems import DataProblem
from kdrecipe.errors import DataError

if TYPE_CHECKING:
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet


@dataclass(frozen=True)
class Utterance:
    """One line of a corpus: an audio file and what is said in it."""

    id: str
    audio: Path
    text: str
    speaker: str
    language: str = "English"


def read_lines(path: Path) -> tuple[list[tuple[int, str]], list[DataProblem]]:
    """Lines of a UTF-8 text file with their numbers (from 1), blank ones left out, each stripped.

    Returns:
        The lines, and a problem for each that is not UTF-8.

    Raises:
        DataError: if there is no such file, or it can't be read to its end.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), remedy="check corpus.root")
    lines, problems = [], []
    for number, raw in enumerate(_raw_lines(path), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            shown = raw.strip().decode("utf-8", "replace")[:40]
            what = f"byte {raw[error.start]:#04x} in {shown!r}"
            problems.append(DataProblem(what, f"{path}:{number}", kind="not_utf8"))
            continue
        if line:
            lines.append((number, line))
    return lines, problems


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        remedy = "it is cut short, or no gzip file: make it again" if path.suffix == ".gz" else ""
        raise DataError(f"can't be read: {error}", where=str(path), remedy=remedy) from None


def gather(
    utterances: Iterable[Utterance], convert_dir: Path | None = None, channel: int | None = None
) -> tuple[RecordingSet, SupervisionSet, list[DataProblem]]:
    """Manifests of utterances that have a file each, by a look at the files' headers.

    Utterances whose audio is missing, unreadable or empty are in the problems and not in the
    manifests; so are all but the first of those that share an id.

    Args:
        utterances: in the order wanted.
        convert_dir: audio in NIST SPHERE, which Lhotse reads only with the program ``sph2pipe``,
            is rewritten here as ``<id>.wav``, sample by sample the same.
        channel: the one that utterances take of files with several, from 0; None: all, which validation
            refuses, since nobody chose.
    """
    from lhotse.audio import AudioSource, Recording, RecordingSet
    from lhotse.supervision import SupervisionSegment, SupervisionSet

    recordings, supervisions, problems = [], [], []
    seen: set[str] = set()
    for utt in utterances:
        if utt.id in seen:
            problems.append(DataProblem(f"again at {utt.audio}", utt.id, kind="duplicate_id", id=utt.id))
            continue
        seen.add(utt.id)
        header = _read_header(utt, convert_dir)
        if isinstance(header, DataProblem):
            problems.append(header)
            continue
        path, rate, num_samples, num_channels = header
        source = AudioSource(type="file", channels=list(range(num_channels)), source=str(path.absolute()))
        duration = num_samples / rate
        heard = list(range(num_channels)) if channel is None else channel
        recordings.append(
            Recording(
                id=utt.id, sources=[source], sampling_rate=rate, num_samples=num_samples, duration=duration
            )
        )
        supervisions.append(
            SupervisionSegment(
                id=utt.id,
                recording_id=utt.id,
                start=0.0,
                duration=duration,
                channel=0 if num_channels == 1 else heard,
                text=utt.text,
                language=utt.language,
                speaker=utt.speaker,
            )
        )
    return RecordingSet.from_recordings(recordings), SupervisionSet.from_segments(supervisions), problems


def _read_header(utt: Utterance, convert_dir: Path | None) -> tuple[Path, int, int, int] | DataProblem:
    """(path, sampling rate, samples, channels) of the audio, or what is wrong with it."""
    import soundfile

    where = str(utt.audio)
    if not utt.audio.is_file():
        return DataProblem("", where, kind="missing_audio", id=utt.id)
    if utt.audio.stat().st_size == 0:
        return DataProblem("", where, kind="zero_length", id=utt.id)
    try:
        info = soundfile.info(str(utt.audio))
        sphere = None
        if info.frames and info.format == "NIST" and convert_dir is not None:
            sphere = soundfile.read(str(utt.audio), dtype="int16", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        return DataProblem(reason(error), where, kind="undecodable", id=utt.id)
    if info.frames == 0:
        return DataProblem("", where, kind="zero_length", id=utt.id)
    if sphere is not None and convert_dir is not None:
        samples, rate = sphere
        convert_dir.mkdir(parents=True, exist_ok=True)
        path = convert_dir / f"{utt.id}.wav"
        soundfile.write(
            path, samples, rate, subtype="PCM_16"
        )  # not above: a full disk is no fault of the file
        num_samples, num_channels = samples.shape
        return path, rate, num_samples, num_channels
    return utt.audio, info.samplerate, info.frames, info.channels


def reason(error: BaseException) -> str:
    """The informative end of an audio library's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "libsndfile" in line.lower() or "sph2pipe" in line]
    text = re.sub(r"^.*(>|opening [^:]*): ", "", (named or lines or [type(error).__name__])[0])
    return text.removeprefix("Error : ").rstrip(".")[:120]
