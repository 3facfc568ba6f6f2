"""What audio is like, held against what its manifest says: one decode per recording.

C channels, S samples, T frames of 0.01 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.corpus.audio import CANCELLED
from kdrecipe.corpus.gather import reason
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.corpus.segments import SHORTEST_S

FRAME_S = 0.01
LENGTH_S = 0.01  # audio may differ from its manifest by less: durations typed with two decimals
SHORT_S, LONG_S = 0.1, 30.0  # utterances outside are noted
BLOCK_S = 30  # decoded at once
SILENCE = 2.1 / 32768  # from lowest to highest sample: no more than dither of 16 bits
FULL_SCALE = 1 - 1.5 / 32768
CLIPPED_SHARE = 1e-3  # of an utterance's samples at full scale
QUIET = 0.01  # peak
LOW_HZ, HIGH_HZ = (2500, 3800), (4700, 7000)
NARROW = 1.5e-3  # power above against below, by frame: AN4 has twice that at least, resampled half at most
MIN_AUDIBLE = 10  # frames: a vowel alone is narrow, too
AUDIBLE = 0.01  # of a block's loudest frame: quieter ones may show the noise of 16 bits


@dataclass
class Sound:
    """What one decode of a file tells.

    Args:
        sample_rate: Hz.
        num_channels: C.
        num_samples: of each channel.
        low_CT: lowest sample of each frame.
        high_CT: highest sample.
        full_CT: number of samples at full scale or beyond.
        num_bad: samples that are NaN or infinite.
        first_bad_s: where the first of them is.
        is_narrow: whether nothing but noise is above 4 kHz.
        cancels: whether the average of the channels is silence.
    """

    sample_rate: int
    num_channels: int
    num_samples: int
    low_CT: np.ndarray
    high_CT: np.ndarray
    full_CT: np.ndarray
    num_bad: int = 0
    first_bad_s: float = 0.0
    is_narrow: bool = False
    cancels: bool = False

    @property
    def duration_s(self) -> float:
        """Its length in seconds."""
        return self.num_samples / self.sample_rate


def check_recording(recording: Any, supervisions: Sequence[Any], sampling_rate: int) -> list[DataProblem]:
    """What is wrong with a recording's audio, or worth a note, utterance by utterance.

    Args:
        recording: a :class:`lhotse.Recording`.
        supervisions: its utterances.
        sampling_rate: in Hz, what it must have.
    """
    where = audio_path(recording)

    def all_of(kind: str, what: str = "") -> list[DataProblem]:
        return [DataProblem(what, where, kind=kind, id=sup.id) for sup in supervisions]

    if fault := _fault_of_manifest(recording, sampling_rate):
        return all_of(*fault)
    channels: dict[int, tuple[Sound, int]] = {}
    for source in recording.sources:
        try:
            sound = listen(recording, source)
        except Exception as error:  # whatever the decoder raises, the file is at fault
            return all_of("undecodable", reason(error))
        if fault := _fault_of_file(recording, source, sound):
            return all_of(*fault)
        channels |= {number: (sound, row) for row, number in enumerate(source.channels)}
    found = [problem for sup in supervisions for problem in _check_utterance(sup, channels, where)]
    sounds = [sound for sound, _ in channels.values()]
    for kind, is_so in (
        ("narrow_band", all(sound.is_narrow for sound in sounds)),
        ("opposite_phase", any(sound.cancels for sound in sounds)),
    ):
        if is_so:
            found.append(DataProblem("", recording.id, kind=kind, id=supervisions[0].id))
    return found


def check_overlaps(supervisions: Sequence[Any]) -> list[DataProblem]:
    """Notes of utterances of one recording that sound at the same time in the same channel."""
    found: list[DataProblem] = []
    latest: dict[int, Any] = {}
    for sup in sorted(supervisions, key=lambda sup: sup.start):
        for channel in _channels(sup):
            other = latest.get(channel)
            if other is not None and other.end - sup.start > LENGTH_S and other.id != sup.id:
                who = "" if sup.speaker == other.speaker else ", another speaker"
                what = f"with {other.id}, {min(other.end, sup.end) - sup.start:.2f} s{who}"
                found.append(DataProblem(what, sup.id, kind="overlapping", id=sup.id))
            if other is None or sup.end > other.end:
                latest[channel] = sup
    return found


def audio_path(recording: Any) -> str:
    """Where a recording's (:class:`lhotse.Recording`) audio is: its first source's file, else its id."""
    files = [source.source for source in recording.sources if source.type == "file"]
    return str(files[0]) if files else str(recording.id)


# ---------------------------------------------------------------- against the manifest


def _fault_of_manifest(recording: Any, sampling_rate: int) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong before anything is decoded."""
    for source in recording.sources:
        if source.type == "file" and not Path(source.source).is_file():
            return "missing_audio", ""
    if recording.num_samples == 0:
        return "zero_length", ""
    if recording.sampling_rate != sampling_rate:
        return "sampling_rate", f"{recording.sampling_rate} Hz instead of {sampling_rate}"
    counted_s = recording.num_samples / recording.sampling_rate
    if abs(counted_s - recording.duration) >= LENGTH_S:
        what = f"duration {recording.duration:.3f} s, but num_samples are {counted_s:.3f} s"
        return "wrong_length", what
    return None


def _fault_of_file(recording: Any, source: Any, sound: Sound) -> tuple[str, str] | None:
    """(kind, detail) of what is not as the manifest says."""
    if sound.num_samples == 0:
        return "zero_length", ""
    if sound.num_bad:
        return "non_finite", f"{sound.num_bad} of them, the first at {sound.first_bad_s:.3f} s"
    if sound.num_channels != len(source.channels):
        what = f"the file has {sound.num_channels}, its manifest names {list(source.channels)}"
        return "no_channel", what
    if (declared := _rate_of_file(recording)) not in (None, sound.sample_rate):
        return "sampling_rate", f"{sound.sample_rate} Hz in the file, {declared} in its manifest"
    if abs(sound.duration_s - recording.duration) >= LENGTH_S:
        return "wrong_length", f"{sound.duration_s:.3f} s, the manifest says {recording.duration:.3f} s"
    return None


def _rate_of_file(recording: Any) -> int | None:
    """The sampling rate that the file should have; None: Lhotse decides that when it decodes."""
    if not _is_plain(recording):
        return None
    names = [_name_and_rate(transform) for transform in recording.transforms or []]
    return names[0][1] if names else int(recording.sampling_rate)


def _is_plain(recording: Any) -> bool:
    """Whether what Lhotse loads is what is in the file, at most resampled."""
    return all(_name_and_rate(transform)[0] == "Resample" for transform in recording.transforms or [])


def _name_and_rate(transform: Any) -> tuple[str, int]:
    """Name of one of Lhotse's transforms, and the rate that it starts from (0: it has none)."""
    if not isinstance(transform, dict):
        transform = transform.to_dict()
    return transform["name"], int(transform["kwargs"].get("source_sampling_rate", 0))


# ---------------------------------------------------------------- utterances


def _channels(sup: Any) -> list[int]:
    return [sup.channel] if isinstance(sup.channel, int) else list(sup.channel)


def _check_utterance(sup: Any, channels: dict[int, tuple[Sound, int]], where: str) -> list[DataProblem]:
    """Problems and notes of one utterance; none if its times are wrong, which is told elsewhere."""
    chosen = _channels(sup)
    if gone := [number for number in chosen if number not in channels]:
        what = f"{sup.id}: {', '.join(map(str, gone))}; there are {', '.join(map(str, sorted(channels)))}"
        return [DataProblem(what, where, kind="no_channel", id=sup.id)]
    if len(chosen) != 1:
        what = f"{sup.id}: {', '.join(map(str, chosen))}"
        return [DataProblem(what, where, kind="several_channels", id=sup.id)]
    sound, row = channels[chosen[0]]
    if sup.start < 0 or sup.duration <= 0 or sup.end > sound.duration_s + 2 * LENGTH_S:
        return []
    at = slice(round(sup.start / FRAME_S), round(sup.end / FRAME_S) + 1)
    low_T, high_T, full_T = sound.low_CT[row, at], sound.high_CT[row, at], sound.full_CT[row, at]
    if len(low_T) == 0:
        return []
    low, high = float(low_T.min()), float(high_T.max())
    is_click = sup.duration < SHORTEST_S  # nothing is heard in it, however loud it is
    if high - low < SILENCE and not is_click and sup.text:
        what = f"{sup.id}: {sup.start:.2f} to {sup.end:.2f} s"
        return [DataProblem(what, where, kind="silent", id=sup.id)]
    notes = {
        "very_short": f"{sup.duration:.2g} s" if sup.duration < SHORT_S else "",
        "very_long": f"{sup.duration:.0f} s" if sup.duration > LONG_S else "",
    }
    if high - low < 2 * QUIET and not is_click:
        notes["quiet"] = f"{20 * np.log10((high - low) / 2):.0f} dB"
    share = int(full_T.sum()) / max(1.0, sup.duration * sound.sample_rate)
    if max(high, -low) > 1.001:
        notes["over_scale"] = f"up to {max(high, -low):.5g}"
    elif share > CLIPPED_SHARE:
        notes["clipped"] = f"{100 * share:.1f} % of its samples"
    return [DataProblem(what, sup.id, kind=kind, id=sup.id) for kind, what in notes.items() if what]


# ---------------------------------------------------------------- listening


def listen(recording: Any, source: Any) -> Sound:
    """Decode one source of a recording, block by block where libsndfile can."""
    import soundfile

    path = str(source.source)
    # Lhotse gives Opus files the rate of the manifest, and applies transforms to whole recordings.
    if source.type == "file" and _is_plain(recording) and not path.endswith(".opus"):
        try:
            file = soundfile.SoundFile(path)
        except soundfile.SoundFileError:
            pass  # Lhotse may know another decoder; else its message says why not
        else:
            with file:
                size = BLOCK_S * file.samplerate
                blocks = file.blocks(size, dtype="float32", always_2d=True, fill_value=None)
                return _summary((block.T for block in blocks), file.samplerate, file.channels)
    audio_CS = np.atleast_2d(recording.load_audio(channels=source.channels))
    size = BLOCK_S * recording.sampling_rate
    parts = (audio_CS[:, i : i + size] for i in range(0, audio_CS.shape[1], size))
    return _summary(parts, recording.sampling_rate, len(audio_CS))


@dataclass
class _Sums:
    """Over blocks: power of the channels, of their average, and upper against lower band by frame."""

    power: float = 0.0
    average_power: float = 0.0
    band_ratio: float = 0.0
    num_audible: int = 0
    frames: list[np.ndarray] = field(default_factory=list)


def _summary(blocks: Iterator[np.ndarray], sample_rate: int, num_channels: int) -> Sound:
    sums, num_samples, num_bad, first_bad_s = _Sums(), 0, 0, 0.0
    for block_CS in blocks:
        if block_CS.shape[1] == 0:
            continue
        bad_CS = ~np.isfinite(block_CS)
        if bad_CS.any():
            if not num_bad:
                first_bad_s = (num_samples + int(bad_CS.any(axis=0).argmax())) / sample_rate
            num_bad += int(bad_CS.sum())
            block_CS = np.where(bad_CS, 0.0, block_CS)
        sums.frames.append(_frames(block_CS, max(1, round(sample_rate * FRAME_S))))
        num_samples += block_CS.shape[1]
        if num_channels > 1:
            sums.power += float((block_CS**2).mean())
            sums.average_power += float((block_CS.mean(axis=0) ** 2).mean())
        _add_bands(sums, block_CS, sample_rate)
    none = [np.zeros((3, num_channels, 0))]
    low_CT, high_CT, full_CT = np.concatenate(sums.frames or none, axis=2)
    is_narrow = _has_no_band(sample_rate) or (
        sums.num_audible >= MIN_AUDIBLE and sums.band_ratio < NARROW * sums.num_audible
    )
    cancels = num_channels > 1 and sums.average_power < CANCELLED * sums.power
    return Sound(
        sample_rate, num_channels, num_samples, low_CT, high_CT, full_CT,
        num_bad, first_bad_s, is_narrow, cancels,
    )  # fmt: skip


def _frames(block_CS: np.ndarray, hop: int) -> np.ndarray:
    """(3, C, T): lowest sample, highest one and the number at full scale of each frame."""
    rest = (0, 0), (0, -block_CS.shape[1] % hop)
    frames_CTH = np.pad(block_CS, rest, mode="edge").reshape(len(block_CS), -1, hop)
    low_CT, high_CT = frames_CTH.min(axis=2), frames_CTH.max(axis=2)
    full_CT = np.zeros_like(low_CT)
    if high_CT.max() >= FULL_SCALE or low_CT.min() <= -FULL_SCALE:
        full_CS = np.pad(np.abs(block_CS) >= FULL_SCALE, rest)
        full_CT[:] = full_CS.reshape(frames_CTH.shape).sum(axis=2)
    return np.stack([low_CT, high_CT, full_CT])


def _has_no_band(sample_rate: int) -> bool:
    return sample_rate < 2 * HIGH_HZ[1]


def _add_bands(sums: _Sums, block_CS: np.ndarray, sample_rate: int) -> None:
    """Power above 4 kHz against that below, of loud frames of 0.03 s (every other one, to be quick)."""
    size = 2 ** round(np.log2(0.032 * sample_rate))
    if _has_no_band(sample_rate) or block_CS.shape[1] < size:
        return
    num_frames = block_CS.shape[1] // size
    frames_CTN = block_CS[:, : num_frames * size].reshape(len(block_CS), num_frames, size)[:, ::2]
    power_TF = (np.abs(np.fft.rfft(frames_CTN * np.hanning(size).astype(np.float32))) ** 2).sum(axis=0)
    hz_F = np.fft.rfftfreq(size, 1 / sample_rate)
    low_T, high_T = (power_TF[:, (hz_F >= f) & (hz_F <= t)].sum(axis=1) for f, t in (LOW_HZ, HIGH_HZ))
    loud_T = (low_T + high_T >= AUDIBLE * (low_T + high_T).max()) & (low_T > 0)
    sums.band_ratio += float((high_T[loud_T] / low_T[loud_T]).sum())
    sums.num_audible += int(loud_T.sum())
