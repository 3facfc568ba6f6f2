"""Stage 0 decodes what it declares good: audio is held against its manifest, and odd audio is noted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

from kdrecipe.corpus.gather import Utterance, gather
from kdrecipe.corpus.manifests import finish, validate_corpus
from kdrecipe.corpus.problems import KINDS, DataProblem, as_left_out, notes_of
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Prepared
from kdrecipe_local.manifests import Manifests

RATE = 16000


def noise(duration_s: float, *, rate: int = RATE, channels: int = 1, level: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise_SC = level * rng.standard_normal((round(duration_s * rate), channels)).clip(-4, 4)
    return noise_SC[:, 0] if channels == 1 else noise_SC


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def recorded(path: Path, **changes: Any) -> Recording:
    return replace(Recording.from_file(path, recording_id=path.stem), **changes)


def said(recording: Recording, name: str = "", start: float = 0.0, **changes: Any) -> SupervisionSegment:
    changes.setdefault("duration", recording.duration - start)
    changes.setdefault("channel", 0)
    return SupervisionSegment(name or recording.id, recording.id, start, text="YES", **changes)


def prepared(*pairs: tuple[Recording, list[SupervisionSegment]]) -> Prepared:
    sups = [sup for _, listed in pairs for sup in listed]
    recordings = RecordingSet.from_recordings([recording for recording, _ in pairs])
    return Prepared({"train": (recordings, SupervisionSet.from_segments(sups))})


def found(*pairs: tuple[Recording, list[SupervisionSegment]]) -> list[tuple[str, str, str]]:
    return [(p.kind, p.id, p.what) for p in validate_corpus(prepared(*pairs))]


def found_in(path: Path) -> list[tuple[str, str, str]]:
    recording = recorded(path)
    return found((recording, [said(recording)]))


# ---------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("off_s", "is_told"), [(0.4, True), (-0.4, True), (0.01, True), (-0.01, True), (0.006, False)]
)
def test_audio_that_is_not_as_long_as_its_manifest_says(tmp_path: Path, off_s: float, is_told: bool) -> None:
    path = write(tmp_path / "a.wav", noise(1.0 - off_s))
    right = write(tmp_path / "right.wav", noise(1.0))
    recording = replace(recorded(right), id="a", sources=recorded(path).sources)
    told = [("wrong_length", "a", f"{1.0 - off_s:.3f} s, the manifest says 1.000 s")]
    assert found((recording, [said(recording)])) == (told if is_told else [])


def test_a_duration_typed_by_hand(tmp_path: Path) -> None:
    """Through the corpus 'manifests', as people write them."""
    write(tmp_path / "a.wav", noise(1.0))
    source = {"type": "file", "channels": [0], "source": "a.wav"}
    line = {"id": "a", "sources": [source], "sampling_rate": RATE, "num_samples": RATE, "duration": 1.4}
    sup = {"id": "a", "recording_id": "a", "start": 0, "duration": 1.4, "channel": 0, "text": "YES"}
    (tmp_path / "train_recordings.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "train_supervisions.jsonl").write_text(json.dumps(sup) + "\n")
    corpus = Manifests(
        Manifests.Config(
            splits={"train": "train"},
            recordings="{part}_recordings.jsonl",
            supervisions="{part}_supervisions.jsonl",
        )
    ).prepare(tmp_path, tmp_path / "out")
    corpus.problems += validate_corpus(corpus)
    with pytest.raises(DataError) as caught:
        finish(corpus, tmp_path / "out", "stop")
    text = str(caught.value)
    assert "1 audio file that is not as long as its manifest says" in text
    assert f"{tmp_path / 'a.wav'} (duration 1.400 s, but num_samples are 1.000 s)" in text
    assert "Recording.from_file" in text


def test_a_rate_that_is_only_the_manifests(tmp_path: Path) -> None:
    """As long as it should be, but twice as fast for whoever believes the manifest."""
    path = write(tmp_path / "a.wav", noise(1.0, rate=8000), 8000)
    recording = recorded(path, sampling_rate=RATE, num_samples=RATE)
    what = "8000 Hz in the file, 16000 in its manifest"
    assert found((recording, [said(recording)])) == [("sampling_rate", "a", what)]


def test_resampled_and_faster_recordings_are_as_long_as_their_manifests_say(tmp_path: Path) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(1.0, rate=44100), 44100))
    for changed in (recording.resample(RATE), recording.resample(RATE).perturb_speed(1.1)):
        assert found((changed, [said(changed)])) == []


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    samples = noise(1.0)
    samples[8000] = value
    told = [("non_finite", "a", "1 of them, the first at 0.500 s")]
    assert found_in(write(tmp_path / "a.wav", samples)) == told


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_silence_under_a_text(tmp_path: Path, value: float) -> None:
    """All zeros, and a constant; a part of a recording, too."""
    path = write(tmp_path / "a.wav", np.full(RATE, value))
    assert found_in(path) == [("silent", "a", "a: 0.00 to 1.00 s")]
    half = recorded(write(tmp_path / "b.wav", np.concatenate([noise(1.0), np.full(RATE, value)])))
    sups = [said(half, "b1", duration=1.0), said(half, "b2", 1.02)]
    assert found((half, sups)) == [("silent", "b2", "b2: 1.02 to 2.00 s")]


def upsampled(samples: np.ndarray) -> np.ndarray:
    slow = torchaudio.functional.resample(torch.from_numpy(samples.astype(np.float32)), RATE, 8000)
    return torchaudio.functional.resample(slow, 8000, RATE).numpy()


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("clipped", lambda x: (20 * x).clip(-1, 1), "62.4 % of its samples"),
        ("over_scale", lambda x: 32768 * x, "up to 13107"),
        ("quiet", lambda x: 0.01 * x, "-48 dB"),
        ("narrow_band", upsampled, ""),
        ("very_short", lambda x: x[:1584], "0.099 s"),
        ("very_short", lambda x: x[:1], "6.3e-05 s"),
        ("very_long", lambda x: np.tile(x, 31), "31 s"),
    ],
)
def test_odd_audio_is_noted(
    tmp_path: Path, kind: str, change: Callable[[np.ndarray], np.ndarray], what: str
) -> None:
    assert found_in(write(tmp_path / "a.wav", change(noise(1.0)))) == [(kind, "a", what)]


def test_audio_of_a_low_rate_is_narrow_whatever_it_is_brought_to(tmp_path: Path) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(1.0, rate=8000), 8000)).resample(RATE)
    assert found((recording, [said(recording)])) == [("narrow_band", "a", "")]


def test_notes_stop_nothing_and_stand_in_the_summary(tmp_path: Path) -> None:
    recordings = [recorded(write(tmp_path / f"q{i}.wav", noise(1.0, level=1e-3))) for i in range(7)]
    corpus = prepared(*((recording, [said(recording)]) for recording in recordings))
    corpus.problems += validate_corpus(corpus)
    assert len(corpus.problems) == 7
    corpus.problems.append(DataProblem("", "q6.wav", kind="undecodable", id="q6"))
    summary = finish(corpus, tmp_path / "out", "skip")
    assert summary.splits["train"]["utterances"] == 6
    assert [entry["id"] for entry in summary.left_out] == ["q6"]
    (note,) = [note for note in summary.notes if "quiet" in note]
    names = ", ".join(f"q{i} (-48 dB)" for i in range(5))
    assert note == f"6 very quiet utterances (peak below -40 dB of full scale): {names} and 1 more"
    assert str(tmp_path) not in note, "reports are published"


def test_every_kind_is_a_note_or_has_a_remedy() -> None:
    for kind, about in KINDS.items():
        problem = DataProblem("", "a", kind=kind, id="a")
        assert bool(about.remedy) != problem.is_note
        assert bool(as_left_out([problem])) != bool(notes_of([problem]))


# ---------------------------------------------------------------- channels


def test_an_utterance_of_several_channels_is_refused(tmp_path: Path) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(1.0, channels=2)))
    assert found((recording, [said(recording, channel=[0, 1])])) == [("several_channels", "a", "a: 0, 1")]
    for channel in (1, [1]):
        assert found((recording, [said(recording, channel=channel)])) == []


def test_a_channel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(1.0, channels=2)))
    told = [("no_channel", "a", "a: 2; there are 0, 1")]
    assert found((recording, [said(recording, channel=2)])) == told


@pytest.mark.parametrize(("in_file", "declared"), [(1, [0, 1]), (2, [0])])
def test_a_manifest_with_other_channels_than_the_file(
    tmp_path: Path, in_file: int, declared: list[int]
) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(1.0, channels=in_file)))
    sources = [replace(recording.sources[0], channels=declared)]
    told = [("no_channel", "a", f"the file has {in_file}, its manifest names {declared}")]
    changed = replace(recording, sources=sources, channel_ids=declared)
    assert found((changed, [said(changed)])) == told


def test_channels_in_files_of_their_own(tmp_path: Path) -> None:
    left = recorded(write(tmp_path / "left.wav", noise(1.0)))
    right = recorded(write(tmp_path / "right.wav", np.zeros(RATE)))
    sources = [left.sources[0], replace(right.sources[0], channels=[1])]
    both = replace(left, sources=sources, channel_ids=[0, 1])
    sups = [said(both, "a", channel=0), said(both, "b", channel=1)]
    assert found((both, sups)) == [("silent", "b", "b: 0.00 to 1.00 s")]


def test_channels_in_opposite_phase_are_noted(tmp_path: Path) -> None:
    left = noise(1.0)
    for right, is_told in ((-left, True), (-0.9 * left, True), (left, False), (noise(1.0)[::-1], False)):
        notes = found_in(write(tmp_path / "a.wav", np.stack([left, right], axis=1)))
        assert notes == ([("opposite_phase", "a", "")] if is_told else [])


def test_gathered_stereo_is_refused_until_a_channel_is_chosen(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", noise(1.0, channels=2))

    def kinds(channel: int | None) -> list[str]:
        utterances = [Utterance("a", tmp_path / "a.wav", "YES", "s")]
        recordings, sups, problems = gather(utterances, channel=channel)
        assert problems == []
        return [p.kind for p in validate_corpus(Prepared({"train": (recordings, sups)}))]

    assert [kinds(None), kinds(1), kinds(2)] == [["several_channels"], [], ["no_channel"]]


@pytest.fixture
def telephone(tmp_path: Path) -> Path:
    """A call with a voice in each channel, and an utterance of both."""
    call = recorded(write(tmp_path / "call.wav", noise(3.0, channels=2)))
    sups = [
        said(call, "a", duration=1.0, channel=0),
        said(call, "b", 1.0, duration=1.0, channel=1),
        said(call, "ab", 2.0, channel=[0, 1]),
    ]
    RecordingSet.from_recordings([call]).to_file(tmp_path / "train_recordings.jsonl.gz")
    SupervisionSet.from_segments(sups).to_file(tmp_path / "train_supervisions.jsonl.gz")
    return tmp_path


@pytest.mark.parametrize(
    ("channel", "kept", "kinds"),
    [
        (None, {"a": 0, "b": 1, "ab": [0, 1]}, ["several_channels"]),
        (0, {"a": 0, "ab": 0}, []),
        (1, {"b": 1, "ab": 1}, []),
    ],
)
def test_the_option_channel(telephone: Path, channel: int | None, kept: dict[str, Any], kinds: list) -> None:
    config = Manifests.Config(splits={"train": "train"}, channel=channel)
    corpus = Manifests(config).prepare(telephone, telephone / "out")
    assert {sup.id: sup.channel for sup in corpus.splits["train"][1]} == kept
    assert [p.kind for p in validate_corpus(corpus)] == kinds
    left_out = f"1 of 3 train utterances are not of channel {channel}"
    assert corpus.notes == ([left_out] if channel is not None else [])


def test_a_channel_that_nothing_names(telephone: Path) -> None:
    config = Manifests.Config(splits={"train": "train"}, channel=2)
    with pytest.raises(DataError, match="no utterance names channel 2, they name 0, 1"):
        Manifests(config).prepare(telephone, telephone / "out")


# ---------------------------------------------------------------- overlaps


def test_utterances_that_overlap_are_noted(tmp_path: Path) -> None:
    recording = recorded(write(tmp_path / "a.wav", noise(6.0, channels=2)))
    sups = [
        said(recording, "u1", 0.0, duration=2.0, speaker="s"),
        said(recording, "u2", 1.5, duration=1.0, speaker="s"),  # within u1's end
        said(recording, "u3", 1.9, duration=0.05, speaker="t"),  # within u2
        said(recording, "u4", 2.495, duration=1.0, speaker="s"),  # rounding
        said(recording, "u5", 2.0, duration=4.0, channel=1, speaker="t"),  # the other channel
    ]
    overlapping = [x for x in found((recording, sups)) if x[0] == "overlapping"]
    assert overlapping == [
        ("overlapping", "u2", "with u1, 0.50 s"),
        ("overlapping", "u3", "with u2, 0.05 s, another speaker"),
    ]
