"""A tiny spoken corpus made of tones, for tests: no download, no synthesiser, learnt in seconds.

Every letter is its own pair of tones, a "formant" pattern that only a letter has; a word is
its letters one after the other, a sentence its words with pauses. Speakers differ in pitch,
tempo and level, and there is a little noise. A CTC model of a few thousand weights reads it after
a few epochs, and one that is wired up wrongly never does, which is all that a test needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kdrecipe.interfaces import SAMPLE_RATE

WORDS = "RED BLUE GREEN TEA SUN DOG CAT BIRD TREE STAR MOON RAIN SNOW WIND FIRE LAKE"

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LOW_HZ = (300.0, 480.0, 700.0, 1000.0, 1350.0)
_HIGH_HZ = (1800.0, 2300.0, 2900.0, 3600.0, 4500.0, 5600.0)
_LETTER_S = 0.10  # more than two encoder frames of 0.04 s, so that CTC always has room
_PAUSE_S = 0.08

Layout = Literal["manifests", "folders", "librispeech", "an4"]


@dataclass(frozen=True)
class _Speaker:
    index: int
    pitch: float
    tempo: float
    level: float


def make_corpus(
    directory: Path | str,
    *,
    num_speakers: int = 6,
    utterances_per_speaker: int = 8,
    seed: int = 0,
    layout: Layout = "manifests",
    parts: Sequence[str] = ("train-clean-5", "dev-clean-2"),
) -> Path:
    """Write the corpus; the same arguments give the same bytes.

    Speakers never cross splits. An utterance has 2 to 4 words and lasts about 1.5 s, 16 kHz.

    Args:
        directory: created if needed.
        num_speakers: 3 or more; one is for dev, one for test, the others are for train.
        utterances_per_speaker: 1 or more.
        seed: of words, voices and noise.
        layout: ``manifests``: ``<split>_{recordings,supervisions}.jsonl.gz`` for train, dev and
            test beside ``audio/*.wav`` (corpus ``manifests``); ``folders``: ``train/``, ``dev/`` and
            ``test/`` with ``*.wav`` and ``*.txt`` (corpus ``folders``); ``librispeech``: parts with
            ``*.flac`` and ``*.trans.txt``, and SPEAKERS.TXT (corpora ``librispeech`` and
            ``mini_librispeech``); ``an4``: ``etc/`` and SPHERE files in ``wav/`` (corpus
            ``an4``; its train holds all speakers but one).
        parts: names of the parts of layout ``librispeech``: the first gets all speakers but
            two (but one per further part, if those are more than two).

    Returns:
        ``directory``, which is the corpus's root.

    Raises:
        ValueError: if there are too few speakers for the splits, or none of the layouts is meant.
    """
    if num_speakers < max(3, len(parts) if layout == "librispeech" else 3):
        raise ValueError(f"num_speakers is {num_speakers}: too few to give each split its own")
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    speakers = [
        _Speaker(i, rng.uniform(0.96, 1.04), rng.uniform(0.9, 1.1), rng.uniform(0.15, 0.4))
        for i in range(num_speakers)
    ]
    utterances = [
        (speaker, number, *_utterance(speaker, np.random.default_rng([seed, 1, speaker.index, number])))
        for speaker in speakers
        for number in range(utterances_per_speaker)
    ]
    if layout == "manifests":
        _write_manifests(directory, utterances, num_speakers)
    elif layout == "folders":
        _write_folders(directory, utterances, num_speakers)
    elif layout == "librispeech":
        _write_librispeech(directory, utterances, num_speakers, parts)
    elif layout == "an4":
        _write_an4(directory, utterances, num_speakers)
    else:
        raise ValueError(f"layout is {layout!r}: expected manifests, folders, librispeech or an4")
    return directory


def speak(text: str, *, pitch: float = 1.0, tempo: float = 1.0) -> np.ndarray:
    """The tones of ``text`` (A to Z and spaces), float32 (S,) at 16 kHz, peak about 1, no noise."""
    pieces = [_silence(_PAUSE_S)]
    for word in text.split():
        pieces += [_letter(letter, pitch, tempo) for letter in word]
        pieces.append(_silence(_PAUSE_S * tempo))
    return np.concatenate(pieces).astype(np.float32)


def _silence(duration_s: float) -> np.ndarray:
    return np.zeros(round(duration_s * SAMPLE_RATE))


def _letter(letter: str, pitch: float, tempo: float) -> np.ndarray:
    index = _LETTERS.index(letter)
    time_s = np.arange(round(_LETTER_S * tempo * SAMPLE_RATE)) / SAMPLE_RATE
    low, high = _LOW_HZ[index % 5] * pitch, _HIGH_HZ[index // 5] * pitch
    tone = np.sin(2 * np.pi * low * time_s) + 0.7 * np.sin(2 * np.pi * high * time_s)
    # Fades at both ends, so that a doubled letter is heard as two.
    return np.asarray(0.6 * tone * np.sin(np.pi * np.arange(len(tone)) / len(tone)) ** 0.5)


def _utterance(speaker: _Speaker, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Text and int16 samples (S,)."""
    text = " ".join(rng.choice(WORDS.split(), size=rng.integers(2, 5)))
    samples = speaker.level * speak(text, pitch=speaker.pitch, tempo=speaker.tempo)
    samples = samples + 0.01 * rng.standard_normal(len(samples))
    return text, np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)


_Utterances = list[tuple[_Speaker, int, str, np.ndarray]]


def _write_manifests(directory: Path, utterances: _Utterances, num_speakers: int) -> None:
    import soundfile
    from lhotse.audio import Recording, RecordingSet
    from lhotse.supervision import SupervisionSegment, SupervisionSet

    (directory / "audio").mkdir(exist_ok=True)
    recordings: dict[str, list] = {"train": [], "dev": [], "test": []}
    supervisions: dict[str, list] = {"train": [], "dev": [], "test": []}
    for speaker, number, text, samples in utterances:
        split = _split_of(speaker, num_speakers)
        name, utterance_id = f"spk{speaker.index:02d}", f"spk{speaker.index:02d}-{number:04d}"
        path = directory / "audio" / f"{utterance_id}.wav"
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        recording = Recording.from_file(path, recording_id=utterance_id)
        recordings[split].append(recording)
        supervisions[split].append(
            SupervisionSegment(
                id=utterance_id,
                recording_id=utterance_id,
                start=0.0,
                duration=recording.duration,
                text=text,
                speaker=name,
            )
        )
    for split in recordings:
        RecordingSet.from_recordings(recordings[split]).to_file(directory / f"{split}_recordings.jsonl.gz")
        SupervisionSet.from_segments(supervisions[split]).to_file(
            directory / f"{split}_supervisions.jsonl.gz"
        )


def _split_of(speaker: _Speaker, num_speakers: int) -> str:
    return {num_speakers - 2: "dev", num_speakers - 1: "test"}.get(speaker.index, "train")


def _write_folders(directory: Path, utterances: _Utterances, num_speakers: int) -> None:
    import soundfile

    for speaker, number, text, samples in utterances:
        folder = directory / _split_of(speaker, num_speakers) / f"spk{speaker.index:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number:04d}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        (folder / f"{number:04d}.txt").write_text(text + "\n")


def _write_librispeech(
    directory: Path, utterances: _Utterances, num_speakers: int, parts: Sequence[str]
) -> None:
    import soundfile

    held_out = max(2, len(parts) - 1) if len(parts) > 1 else 0
    part_of = {}
    for index in range(num_speakers):
        place = index - (num_speakers - held_out)  # 0 ... held_out - 1 for those not in the first part
        part_of[index] = parts[0] if place < 0 else parts[1 + place % (len(parts) - 1)]
    for speaker, number, text, samples in utterances:
        reader, chapter = str(100 + speaker.index), str(1000 + speaker.index)
        folder = directory / part_of[speaker.index] / reader / chapter
        folder.mkdir(parents=True, exist_ok=True)
        utterance_id = f"{reader}-{chapter}-{number:04d}"
        soundfile.write(folder / f"{utterance_id}.flac", samples, SAMPLE_RATE, subtype="PCM_16")
        with open(folder / f"{reader}-{chapter}.trans.txt", "w" if number == 0 else "a") as file:
            file.write(f"{utterance_id} {text}\n")
    lines = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    lines += [f"{100 + i:<5}| M | {part_of[i]:<16} | 0.20  | Tone {i}" for i in range(num_speakers)]
    (directory / "SPEAKERS.TXT").write_text("\n".join(lines) + "\n")


def _write_an4(directory: Path, utterances: _Utterances, num_speakers: int) -> None:
    import soundfile

    (directory / "etc").mkdir(exist_ok=True)
    file_ids: dict[str, list[str]] = {"train": [], "test": []}
    transcripts: dict[str, list[str]] = {"train": [], "test": []}
    for speaker, number, text, samples in utterances:
        split = "test" if speaker.index == num_speakers - 1 else "train"
        folder = "an4test_clstk" if split == "test" else "an4_clstk"
        name = f"mt{chr(ord('a') + speaker.index // 26)}{chr(ord('a') + speaker.index % 26)}"
        utterance_id = f"an{number}-{name}-b"
        path = directory / "wav" / folder / name / f"{utterance_id}.sph"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, SAMPLE_RATE, format="NIST", subtype="PCM_16")
        file_ids[split].append(f"{folder}/{name}/{utterance_id}")
        transcripts[split].append(f"<s> {text} </s> ({utterance_id})")
    for split in file_ids:
        (directory / "etc" / f"an4_{split}.fileids").write_text("\n".join(file_ids[split]) + "\n")
        (directory / "etc" / f"an4_{split}.transcription").write_text("\n".join(transcripts[split]) + "\n")
