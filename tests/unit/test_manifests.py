"""Manifests: what is wrong with a corpus is found, told in one list, and never left out in silence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, RecordingSet, SupervisionSet

from kdrecipe.corpus.gather import Utterance, gather, read_lines
from kdrecipe.corpus.manifests import check_lengths, finish, transcripts, validate_corpus
from kdrecipe.corpus.problems import DataProblem, as_left_out, settle
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import Prepared
from kdrecipe.testing.corpus import make_corpus
from kdrecipe_local.librispeech import MiniLibriSpeech
from kdrecipe_local.manifests import Manifests
from kdrecipe_plugins.architectures.conformer import Conformer


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("tones"), utterances_per_speaker=3)


@pytest.fixture
def prepared(tones: Path, tmp_path: Path) -> Prepared:
    return Manifests(Manifests.Config()).prepare(tones, tmp_path)


@pytest.fixture
def reading(tmp_path: Path) -> Path:
    """A LibriSpeech-like corpus that a test may damage: readers 100 to 105, 3 utterances each."""
    return make_corpus(tmp_path / "LibriSpeech", utterances_per_speaker=3, layout="librispeech")


def prepare_and_validate(root: Path, out_dir: Path) -> Prepared:
    prepared = MiniLibriSpeech(MiniLibriSpeech.Config()).prepare(root, out_dir)
    prepared.problems += validate_corpus(prepared)
    return prepared


def damage(root: Path) -> None:
    """One mistake of every kind that a corpus on disk can have, two of the first."""
    folder = root / "train-clean-5"
    (folder / "100/1000/100-1000-0000.flac").unlink()
    (folder / "100/1000/100-1000-0001.flac").unlink()
    broken = folder / "101/1001/101-1001-0000.flac"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])  # the header is good
    (folder / "101/1001/101-1001-0001.flac").write_bytes(b"no audio at all")
    soundfile.write(folder / "101/1001/101-1001-0002.flac", np.zeros(0, np.int16), 16000)
    soundfile.write(folder / "102/1002/102-1002-0000.flac", np.zeros(8000, np.int16), 8000)
    text_file = folder / "102/1002/102-1002.trans.txt"
    lines = text_file.read_bytes().splitlines()
    lines[1] = b"102-1002-0001"
    lines[2] = b"102-1002-0002 CAF\xc9"
    text_file.write_bytes(b"\n".join(lines) + b"\n" + lines[0] + b"\n")
    shutil.copy(folder / "103/1003/103-1003-0000.flac", folder / "103/1003/103-1003-0009.flac")


def test_a_good_corpus_has_no_problems(prepared: Prepared, tmp_path: Path) -> None:
    assert validate_corpus(prepared, num_workers=2) == []
    summary = finish(prepared, tmp_path, "stop")
    assert [(s["utterances"], s["speakers"]) for s in summary.splits.values()] == [(12, 4), (3, 1), (3, 1)]
    durations = {s: sum(x.duration for x in sups) for s, (_, sups) in prepared.splits.items()}
    assert {s: v["hours"] for s, v in summary.splits.items()} == {
        s: round(d / 3600, 4) for s, d in durations.items()
    }
    assert summary.left_out == []
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"splits": summary.splits, "left_out": [], "notes": summary.notes}
    for split, (recordings, supervisions) in prepared.splits.items():
        assert list(RecordingSet.from_file(tmp_path / f"{split}_recordings.jsonl.gz")) == list(recordings)
        assert list(SupervisionSet.from_file(tmp_path / f"{split}_supervisions.jsonl.gz")) == list(
            supervisions
        )


def test_equal_manifests_have_equal_bytes(prepared: Prepared, tmp_path: Path) -> None:
    finish(prepared, tmp_path / "a", "stop")
    finish(prepared, tmp_path / "b", "stop")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_all_that_is_wrong_is_one_list_by_kind(reading: Path, tmp_path: Path) -> None:
    damage(reading)
    prepared = prepare_and_validate(reading, tmp_path)
    with pytest.raises(DataError) as caught:
        finish(prepared, tmp_path / "out", "stop")
    folder = reading / "train-clean-5"
    found = {problem.what.split(":")[0]: problem.what.split(": ", 1)[1] for problem in caught.value.problems}
    assert list(found) == [
        "2 transcripts without audio",
        "1 audio file without a transcript",
        "2 audio files that can't be decoded",
        "1 audio file of zero length",
        "1 audio file with a wrong sampling rate",
        "1 id that occurs more than once",
        "1 empty transcript",
        "1 text that is not UTF-8",
    ]
    assert found["2 transcripts without audio"] == (
        f"{folder}/100/1000/100-1000-0000.flac, {folder}/100/1000/100-1000-0001.flac"
    )
    assert found["1 audio file without a transcript"] == f"{folder}/103/1003/103-1003-0009.flac"
    assert found["2 audio files that can't be decoded"] == (
        f"{folder}/101/1001/101-1001-0001.flac (Format not recognised), "
        f"{folder}/101/1001/101-1001-0000.flac (flac decoder lost sync)"
    )
    assert found["1 audio file of zero length"] == f"{folder}/101/1001/101-1001-0002.flac"
    assert found["1 audio file with a wrong sampling rate"] == (
        f"{folder}/102/1002/102-1002-0000.flac (8000 Hz instead of 16000)"
    )
    assert found["1 id that occurs more than once"].startswith("102-1002-0000 (")
    assert found["1 empty transcript"] == f"{folder}/102/1002/102-1002.trans.txt:2 (102-1002-0001)"
    assert found["1 text that is not UTF-8"].startswith(f"{folder}/102/1002/102-1002.trans.txt:3 (byte 0xc9")
    assert all(problem.remedy for problem in caught.value.problems)
    assert "on_error: skip" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_skip_leaves_out_what_is_wrong_and_lists_it(reading: Path, tmp_path: Path) -> None:
    damage(reading)
    prepared = prepare_and_validate(reading, tmp_path)
    summary = finish(prepared, tmp_path / "out", "skip")
    kept = SupervisionSet.from_file(tmp_path / "out" / "train_supervisions.jsonl.gz")
    assert [sup.id for sup in kept] == ["100-1000-0002"] + [f"103-1003-000{i}" for i in range(3)]
    audio = RecordingSet.from_file(tmp_path / "out" / "train_recordings.jsonl.gz")
    assert [recording.id for recording in audio] == [sup.id for sup in kept]
    assert summary.splits["train"]["utterances"] == 4
    left_out = {entry["id"]: entry["reason"] for entry in summary.left_out}
    text_file = reading / "train-clean-5/102/1002/102-1002.trans.txt"
    assert left_out["100-1000-0000"] == "transcript without audio"
    assert left_out["101-1001-0002"] == "audio file of zero length"
    assert left_out["102-1002-0001"] == "empty transcript: 102-1002-0001"
    assert left_out[f"{text_file}:3"].startswith("text that is not UTF-8")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"] == summary.left_out
    # 8 utterances and a file without text; one of them for two reasons, as it is there twice
    assert len(left_out) == 9
    assert len(summary.left_out) == 10


def test_an_undamaged_part_is_what_lhotse_prepares(reading: Path, tmp_path: Path) -> None:
    from lhotse.recipes import prepare_librispeech

    expected = prepare_librispeech(reading, dataset_parts=["train-clean-5"])["train-clean-5"]
    recordings, supervisions = (
        MiniLibriSpeech(MiniLibriSpeech.Config()).prepare(reading, tmp_path).splits["train"]
    )
    assert list(supervisions) == sorted(expected["supervisions"], key=lambda s: s.id)
    assert list(recordings) == sorted(expected["recordings"], key=lambda r: r.id)
    (reading / "train-clean-5/100/1000/100-1000-0000.flac").unlink()
    _, gathered = MiniLibriSpeech(MiniLibriSpeech.Config()).prepare(reading, tmp_path).splits["train"]
    assert list(gathered) == list(supervisions)[1:]


def test_many_files_are_counted_and_listed_in_a_file(tmp_path: Path) -> None:
    problems = [DataProblem("", f"{i}.wav", kind="missing_audio", id=str(i)) for i in range(25)]
    with pytest.raises(DataError, match=r"25 transcripts without audio: 0.wav, .* and 15 more") as caught:
        settle(problems, "stop", tmp_path / "problems.txt")
    assert "10.wav" not in str(caught.value)
    assert str(tmp_path / "problems.txt") in str(caught.value)
    lines = (tmp_path / "problems.txt").read_text().splitlines()
    assert lines == [f"transcript without audio\t{i}.wav" for i in range(25)]


def test_a_problem_that_skipping_does_not_mend_stops_anyway() -> None:
    with pytest.raises(DataError, match="disk is full"):
        settle([Problem("the disk is full"), DataProblem("", "a", kind="missing_audio", id="a")], "skip")
    assert settle([DataProblem("", "a", kind="missing_audio", id="a")], "skip") == {"a"}
    assert settle([], "stop") == set()


def test_a_split_from_which_all_is_left_out_stops(prepared: Prepared, tmp_path: Path) -> None:
    problems = [DataProblem("", sup.id, kind="empty_text", id=sup.id) for sup in prepared.splits["dev"][1]]
    with pytest.raises(DataError, match="1 split without utterances: dev"):
        finish(replace(prepared, problems=problems), tmp_path, "skip")


def test_transcripts_are_checked_against_their_recordings(prepared: Prepared) -> None:
    recordings, supervisions = prepared.splits["train"]
    sups = list(supervisions)
    changed = [
        replace(sups[0], duration=99.0),
        replace(sups[1], text=" "),
        replace(sups[2], recording_id="nowhere"),
        replace(sups[3], text="CAF\ufffd"),
        *sups[4:],
        replace(sups[4], text="AGAIN"),
    ]
    dev = prepared.splits["dev"]
    splits = {"train": (recordings, SupervisionSet.from_segments(changed)), "dev": dev, "test": dev}
    problems = validate_corpus(Prepared(splits))
    found = [(problem.kind, problem.id) for problem in problems]
    assert found == [
        ("beyond_audio", sups[0].id),
        ("empty_text", sups[1].id),
        ("missing_audio", sups[2].id),
        ("not_utf8", sups[3].id),
        ("duplicate_id", sups[4].id),
        *[("duplicate_id", sup.id) for sup in dev[1]],
    ]
    assert problems[0].what == f"0.00 to 99.00 s of {next(iter(recordings)).duration:.2f} s"
    assert problems[-1].what == "in dev and test"


def respelled(prepared: Prepared, split: str, texts: dict[int, str]) -> None:
    """Give some utterances of a split other texts, by number."""
    recordings, supervisions = prepared.splits[split]
    sups = [replace(sup, text=texts.get(i, sup.text)) for i, sup in enumerate(supervisions)]
    prepared.splits[split] = recordings, SupervisionSet.from_segments(sups)


def test_texts_are_written_by_one_rule_and_the_report_tells(prepared: Prepared, tmp_path: Path) -> None:
    respelled(prepared, "train", {0: "\ufeffRED\u2028 SUN\u0085", 1: "CAFE\u0301\u3000BLUE\t", 2: "A\u00adB"})
    assert not validate_corpus(prepared)
    notes = finish(prepared, tmp_path / "out", "stop").notes
    assert transcripts(tmp_path / "out", "train")[:3] == ["RED SUN", "CAFÉ BLUE", "A\u00adB"]
    (odd,) = [note for note in notes if "invisible" in note]
    assert odd.startswith("3 train transcripts have invisible characters or rare spaces: ")
    assert "U+2028 (1)" in odd
    assert "U+00AD (1)" in odd
    assert "1 train transcripts were brought to Unicode's normal form C" in notes


@pytest.mark.parametrize("text", ["RED\0SUN", "RED \x1b SUN", "\ud83d RED"], ids=ascii)
def test_control_characters_are_problems(prepared: Prepared, tmp_path: Path, text: str) -> None:
    respelled(prepared, "dev", {0: text})
    (problem,) = validate_corpus(prepared)
    assert problem.kind == "control_characters"
    assert "U+" in problem.what
    prepared.problems.append(problem)
    with pytest.raises(DataError, match="1 transcript with control characters"):
        finish(prepared, tmp_path / "out", "stop")
    assert [row["id"] for row in finish(prepared, tmp_path / "out", "skip").left_out] == [problem.id]


@pytest.mark.parametrize("text", ["\u3000\ufeff", "\u2028\u0085 \t"], ids=ascii)
def test_white_space_alone_is_an_empty_transcript(prepared: Prepared, text: str) -> None:
    respelled(prepared, "dev", {0: text})
    assert [problem.kind for problem in validate_corpus(prepared)] == ["empty_text"]


def test_transcripts_that_are_all_the_same_are_noted(prepared: Prepared, tmp_path: Path) -> None:
    respelled(prepared, "train", dict.fromkeys(range(1000), "a"))
    number = len(prepared.splits["train"][1])
    assert f"all {number} train transcripts are the same: 'a'" in finish(prepared, tmp_path, "stop").notes


def test_duplicates_are_kept_once(prepared: Prepared, tmp_path: Path) -> None:
    recordings, supervisions = prepared.splits["train"]
    twice = SupervisionSet.from_segments([*supervisions, next(iter(supervisions))])
    prepared.splits["train"] = (recordings, twice)
    prepared.problems += validate_corpus(prepared)
    summary = finish(prepared, tmp_path, "skip")
    assert summary.splits["train"]["utterances"] == len(list(supervisions))
    assert [entry["reason"] for entry in summary.left_out] == ["id that occurs more than once: in train"]


def test_recordings_without_a_transcript_are_a_note(prepared: Prepared, tmp_path: Path) -> None:
    recordings, supervisions = prepared.splits["dev"]
    prepared.splits["dev"] = (recordings, SupervisionSet.from_segments(list(supervisions)[1:]))
    summary = finish(prepared, tmp_path, "stop")
    gone = next(iter(recordings)).id
    assert f"1 recordings of dev have no transcript, not used: {gone}" in summary.notes
    assert len(list(RecordingSet.from_file(tmp_path / "dev_recordings.jsonl.gz"))) == 2


def test_shared_sentences_and_speakers_are_notes(prepared: Prepared, tmp_path: Path) -> None:
    recordings, supervisions = prepared.splits["test"]
    train = list(prepared.splits["train"][1])
    sups = [replace(sup, text=train[0].text, speaker=train[0].speaker) for sup in supervisions]
    prepared.splits["test"] = (recordings, SupervisionSet.from_segments(sups))
    prepared.notes.clear()
    notes = finish(prepared, tmp_path, "stop").notes
    assert "3 of 3 test sentences occur in train" in notes
    assert f"1 speakers of test are also in train: {train[0].speaker}" in notes


class OneTokenPerLetter:
    vocab_id = "letters"

    def __len__(self) -> int:
        return 29

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) - ord("A") for letter in text if letter != " "]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("A") + i - 3) for i in ids)


@pytest.mark.parametrize(
    ("text", "fits"),
    [("ABCDEFGHIJ", True), ("ABCDEFGHIJK", False), ("AABCDEFGH", True), ("AABBCDEFG", False)],
)
def test_text_too_long_for_its_audio(tmp_path: Path, text: str, fits: bool) -> None:
    """0.4 s are 40 feature frames, 10 encoder frames; a doubled letter needs a blank more."""
    soundfile.write(tmp_path / "a.wav", np.zeros(6400, np.int16), 16000)
    recordings, supervisions, _ = gather([Utterance("a", tmp_path / "a.wav", text, "s")])
    cuts = CutSet.from_manifests(recordings, supervisions)
    problems = check_lengths(cuts, OneTokenPerLetter(), 4)
    assert problems == check_lengths(cuts, OneTokenPerLetter(), lambda num_frames: num_frames // 4)
    if fits:
        assert problems == []
    else:
        assert [(p.kind, p.where) for p in problems] == [("too_short", str(tmp_path / "a.wav"))]
        assert "0.40 s give 10 frames" in problems[0].what
        assert as_left_out(problems)[0]["reason"].startswith("utterance too short for its text: ")


@pytest.mark.parametrize(("text", "fits"), [("ABCDEFGHIJK", True), ("ABCDEFGHIJKL", False)])
def test_a_last_incomplete_frame_counts(tmp_path: Path, text: str, fits: bool) -> None:
    """0.41 s are 41 feature frames, 11 encoder frames: encoders pad, and take the ceiling."""
    soundfile.write(tmp_path / "a.wav", np.zeros(6560, np.int16), 16000)
    recordings, supervisions, _ = gather([Utterance("a", tmp_path / "a.wav", text, "s")])
    cuts = CutSet.from_manifests(recordings, supervisions)
    encoder = Conformer(Conformer.Config(num_layers=1, dim=8, num_heads=2), 80)
    problems = check_lengths(cuts, OneTokenPerLetter(), encoder.subsampling)
    assert problems == check_lengths(cuts, OneTokenPerLetter(), encoder.output_len)
    assert (problems == []) == fits


def test_sphere_is_rewritten_sample_by_sample(tmp_path: Path) -> None:
    samples = np.arange(-500, 500, dtype=np.int16)
    soundfile.write(tmp_path / "a.sph", samples, 16000, format="NIST", subtype="PCM_16")
    recordings, _, problems = gather([Utterance("a", tmp_path / "a.sph", "A", "s")], tmp_path / "audio")
    assert problems == []
    path = next(iter(recordings)).sources[0].source
    assert path == str(tmp_path / "audio" / "a.wav")
    np.testing.assert_array_equal(soundfile.read(path, dtype="int16")[0], samples)


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone \n\nna\xefve\nthree\r\n")
    lines, problems = read_lines(path)
    assert lines == [(1, "one"), (4, "three")]
    assert [(p.where, p.kind) for p in problems] == [(f"{path}:3", "not_utf8")]
    with pytest.raises(DataError, match="no such file"):
        read_lines(tmp_path / "absent")


def test_manifests_corpus(tones: Path, tmp_path: Path) -> None:
    """Relative audio paths, other file names, resampling, a line that is no manifest entry."""
    import gzip

    root = tmp_path / "root"
    root.mkdir()
    soundfile.write(root / "a.wav", np.sin(np.arange(8000)) / 2, 8000)
    entry = next(iter(RecordingSet.from_file(tones / "dev_recordings.jsonl.gz"))).to_dict()
    entry |= {"id": "a", "sampling_rate": 8000, "num_samples": 8000, "duration": 1.0}
    entry["sources"][0]["source"] = "a.wav"
    with gzip.open(root / "rec_x.jsonl.gz", "wt") as file:
        file.write(json.dumps(entry) + "\n{}\n")
    sup = {"id": "a", "recording_id": "a", "start": 0.0, "duration": 1.0, "text": "A", "speaker": "s"}
    (root / "sup_x.jsonl").write_text(json.dumps(sup) + "\n")
    options = {
        "splits": {"test": "x"},
        "recordings": "rec_{part}.jsonl.gz",
        "supervisions": "sup_{part}.jsonl",
    }
    prepared = Manifests(Manifests.Config(**options)).prepare(root, tmp_path)
    assert [(p.kind, p.where) for p in prepared.problems] == [("malformed", f"{root}/rec_x.jsonl.gz:2")]
    assert [p.kind for p in validate_corpus(prepared)] == ["sampling_rate"]
    prepared = Manifests(Manifests.Config(**options, resample=True)).prepare(root, tmp_path)
    assert [p.kind for p in validate_corpus(prepared)] == ["narrow_band"]
    assert next(iter(prepared.splits["test"][0])).load_audio().shape == (1, 16000)
    with pytest.raises(DataError, match="no such manifest") as caught:
        Manifests(Manifests.Config()).prepare(root, tmp_path)
    assert len(caught.value.problems) == 6
    with pytest.raises(DataError, match="needs a root"):
        Manifests(Manifests.Config()).prepare(None, tmp_path)
