"""Corpus ``folders``: files with a transcript beside them, and whole calls without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdrecipe.corpus.manifests import finish, validate_corpus
from kdrecipe.errors import DataError
from kdrecipe.testing.corpus import speak
from kdrecipe_local.folders import Folders


def write(path: Path, *sides: np.ndarray, rate: int = 16000, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    longest = max(map(len, sides))
    soundfile.write(path, np.stack([np.pad(s, (0, longest - len(s))) for s in sides], 1), rate)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def talk(seconds: float, rate: int = 16000) -> np.ndarray:
    """Words, with half a second between them."""
    word = np.concatenate([0.3 * speak("SUN"), np.zeros(rate // 2, np.float32)])
    return np.resize(word, round(seconds * rate)).astype(np.float32)


@pytest.fixture
def root(tmp_path) -> Path:
    quiet = np.zeros(8000 * 3, np.float32)
    write(tmp_path / "train" / "call1.wav", talk(25, 8000), np.concatenate([quiet, talk(4, 8000)]), rate=8000)
    write(tmp_path / "train" / "anna" / "a.flac", talk(1), text="SUN\n")
    write(tmp_path / "test" / "call2.wav", talk(1), text="\ufeffSUN  SUN")
    return tmp_path


def prepared(root: Path, **options):
    return Folders(Folders.Config(**options)).prepare(root, root / "out")


def test_calls_without_a_transcript_are_cut_side_by_side(root, tmp_path):
    found = prepared(root, longest_s=10)
    assert list(found.splits) == ["train", "test"]
    recordings, supervisions = map(list, found.splits["train"])
    assert [r.sampling_rate for r in recordings] == [16000, 16000]
    sides = {side: [s for s in supervisions if s.speaker == f"train-call1-{side}"] for side in (0, 1)}
    for side, pieces in sides.items():
        assert {piece.channel for piece in pieces} == {side}
        assert all(0 < piece.duration <= 10 and not piece.text for piece in pieces)
    assert sum(piece.duration for piece in sides[0]) == pytest.approx(25, abs=0.01)
    assert [s.start for s in sides[0]] == sorted(s.start for s in sides[0])
    assert sum(piece.duration for piece in sides[1]) < 20, "silence alone is no utterance"
    assert found.notes == [
        f"1 files of train have no transcript and were cut into {len(supervisions) - 1} utterances"
    ]
    problems = validate_corpus(found, without_text=["train"])
    assert [p for p in problems if not p.is_note] == []
    assert finish(found, tmp_path / "manifests", "stop").splits["test"]["utterances"] == 1


def test_a_transcript_beside_a_file_is_its_text(root):
    splits = prepared(root).splits
    [anna] = [s for s in splits["train"][1] if s.text]
    assert (anna.id, anna.text, anna.speaker) == ("train-anna-a", "SUN", "anna")
    [test] = splits["test"][1]
    assert (test.text, test.speaker) == ("SUN SUN", "test-call2")


def test_one_channel_may_be_chosen(root):
    found = prepared(root, channel=1)
    assert {s.channel for s in found.splits["train"][1] if not s.text} == {1}
    problems = validate_corpus(prepared(root, channel=2), without_text=["train"])
    assert "no_channel" in {p.kind for p in problems}


def test_what_is_amiss_is_told(root):
    (root / "train" / "broken.wav").write_bytes(b"RIFF")
    write(root / "train" / "latin.wav", talk(1))
    (root / "train" / "latin.txt").write_bytes("Z\xfcrich".encode("latin1"))
    assert {p.kind for p in prepared(root).problems} == {"undecodable", "not_utf8"}
    write(root / "dev" / "x.wav", talk(1))
    problems = validate_corpus(prepared(root), without_text=["train"])
    assert [p.kind for p in problems if not p.is_note] == ["empty_text"]
    with pytest.raises(DataError, match="there is no audio for train") as caught:
        prepared(root, splits={"train": "calls"})
    assert "corpus.splits" in caught.value.problems[0].remedy
