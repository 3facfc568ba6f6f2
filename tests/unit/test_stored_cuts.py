"""Cuts read from the disk by an index: the same cuts, little memory, an index that is of this file."""

from __future__ import annotations

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from kdrecipe.artifacts import write_jsonl_gz
from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import load_cuts
from kdrecipe.data.stored_cuts import StoredCuts
from kdrecipe.errors import DataError

NUM = 300  # some ten blocks


def a_cut(k: int, **changed) -> dict:
    copy = k % 3 == 1
    cut_id = f"é{k - copy:04d}" + "_sp0.9" * copy
    duration = round(2 + 8 * ((k * 7919) % 101) / 101, 2)
    recording = {"id": cut_id, "num_samples": round(duration * 16000), "sampling_rate": 16000}
    recording |= {"duration": duration, "channel_ids": [0]}
    recording["sources"] = [{"type": "file", "channels": [0], "source": f"audio/{k}.flac"}]
    if copy:
        recording["transforms"] = [{"name": "Speed", "kwargs": {"factor": 0.9}}]
    features = {"type": "kaldi-fbank", "num_frames": 5, "num_features": 4, "frame_shift": 0.01}
    features |= {"sampling_rate": 16000, "start": 0, "duration": duration, "storage_type": "numpy_files"}
    features |= {"storage_path": "storage", "storage_key": "shared.npy", "channels": 0}
    supervision = {"id": cut_id, "recording_id": cut_id, "start": 0.0, "duration": duration, "channel": 0}
    supervision |= {"text": "" if k % 10 == 0 else f"WORD {k}", "speaker": f"s{k % 5}"}
    cut = {"id": cut_id, "start": 0, "duration": duration, "channel": 0, "supervisions": [supervision]}
    return cut | {"features": features, "recording": recording, "type": "MonoCut"} | changed


class Letters:
    vocab_id = "letters"

    def __len__(self) -> int:
        return 40

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 30 for c in text]

    def decode(self, ids) -> str:
        return ""


@pytest.fixture
def features(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir()
    np.save(tmp_path / "storage" / "shared.npy", np.ones((5, 4), np.float32))
    write_jsonl_gz(tmp_path / "train.jsonl.gz", map(a_cut, range(NUM)))
    return tmp_path


def test_they_are_what_lhotse_reads(features):
    cuts, theirs = load_cuts(features, "train"), CutSet.from_file(features / "train.jsonl.gz").to_eager()
    assert list(cuts.ids) == list(theirs.ids)
    assert len(cuts) == NUM
    assert cuts.durations_s.tolist() == [cut.duration for cut in theirs]
    for number in (0, 17, 150, NUM - 1):  # in any order, each by itself
        cut = cuts[number]
        assert cut.supervisions == theirs[cut.id].supervisions
        assert cuts.number(cut.id) == number
        assert cut.recording.sources[0].source == str(features / f"audio/{number}.flac")
    assert cuts.has_text.sum() == 0.9 * NUM
    with pytest.raises(KeyError):
        cuts.number("nobody")


def test_the_manifest_is_one_gzip_file_of_many_blocks(features):
    data = (features / "train.jsonl.gz").read_bytes()
    assert gzip.decompress(data).count(b"\n") == NUM
    assert len(StoredCuts(features / "train.jsonl.gz")._index.checksums) > 5


def test_batches_are_the_same_as_of_cuts_in_memory(features):
    def made(cuts):
        return CutBatches(cuts, Letters(), batch_duration_s=40, seed=3)

    stored = load_cuts(features, "train")
    one, other = made(stored), made(list(stored))
    assert one.epoch(5) == other.epoch(5)
    assert one.digest == other.digest
    assert one.num_labelled == other.num_labelled
    ids = one.epoch(5)[2]
    assert one.load(ids).texts == other.load(ids).texts
    assert (one.load(ids).tokens_BU == other.load(ids).tokens_BU).all()


def test_some_of_them(features):
    cuts = load_cuts(features, "train")
    originals = cuts.select(cuts.all() - cuts.copies())
    assert [cut.id for cut in originals] == [i for i in cuts.ids if "_sp" not in i]
    assert originals.number(originals.id(77)) == 77
    with pytest.raises(KeyError):
        originals.number("é0000_sp0.9")
    two = cuts.chosen(["é0002", "nobody", "é0003_sp0.9"])
    assert two == {"é0002", "é0003_sp0.9"}
    assert "é0002" in two
    assert "nobody" not in two
    assert two | {"x"} == {"é0002", "é0003_sp0.9", "x"}
    assert two - {"é0002"} == {"é0003_sp0.9"}
    assert [cut.id for cut in cuts.select(two)] == ["é0002", "é0003_sp0.9"]
    assert originals.among(two).sum() == 1


def test_other_transcripts(features):
    cuts = load_cuts(features, "train").with_texts({"é0003": "SAID", "é0000": "NOW"})
    said = {cut.id: cut.supervisions[0].text for cut in cuts}
    assert said["é0003"] == said["é0003_sp0.9"] == "SAID"
    assert said["é0002"] == "WORD 2"
    assert cuts.has_text[0], "it had none"
    assert not load_cuts(features, "train").has_text[0]


def test_an_index_is_written_once_and_the_same_anywhere(features, tmp_path):
    load_cuts(features, "train")
    made = (features / "train.index.npz").read_bytes()
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(features / "train.jsonl.gz", copy)
    load_cuts(copy, "train")
    assert (copy / "train.index.npz").read_bytes() == made


def test_an_index_of_another_manifest_is_not_used(features):
    load_cuts(features, "train")
    path = features / "train.jsonl.gz"
    before = path.stat()
    cuts = [a_cut(k) for k in range(NUM)]
    cuts[1], cuts[2] = cuts[2], cuts[1]
    write_jsonl_gz(path, cuts)
    assert abs(path.stat().st_size - before.st_size) < 50
    assert list(load_cuts(features, "train").ids)[:3] == ["é0000", "é0002", "é0000_sp0.9"]


@pytest.mark.parametrize("damage", [b"", b"no index", b"PK\x05\x06" + bytes(18)])
def test_a_damaged_index_is_made_again(features, damage):
    load_cuts(features, "train")
    (features / "train.index.npz").write_bytes(damage)
    assert len(load_cuts(features, "train")) == NUM
    assert len((features / "train.index.npz").read_bytes()) > 1000


def test_manifests_that_others_wrote(features):
    """One block, lines and all; the last one without an end."""
    lines = gzip.decompress((features / "train.jsonl.gz").read_bytes()).rstrip(b"\n")
    (features / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    cuts = load_cuts(features, "train")
    assert len(cuts) == NUM
    assert cuts[NUM - 1].id == a_cut(NUM - 1)["id"]


def test_a_manifest_cut_short_is_told(features):
    path = features / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged") as told:
        load_cuts(features, "train")
    assert str(path) in str(told.value)
    assert "--force" in str(told.value)


def test_cuts_that_batches_can_not_be_made_of(features):
    def batches(*cuts):
        write_jsonl_gz(features / "train.jsonl.gz", cuts)
        return CutBatches(load_cuts(features, "train"), Letters(), batch_duration_s=40, seed=3)

    with pytest.raises(DataError, match="more than once"):
        batches(a_cut(2), a_cut(3), a_cut(2))
    bare = a_cut(3)
    del bare["features"]
    with pytest.raises(DataError, match="no features") as told:
        batches(a_cut(2), bare)
    assert "é0003" in str(told.value)
    with pytest.raises(DataError, match="no utterances"):
        batches()


def test_memory_is_bounded_by_the_number_of_cuts(tmp_path):
    """At most 200 bytes a cut to plan an epoch, where Lhotse's objects take 2,500."""
    one = json.dumps(a_cut(2), ensure_ascii=False)
    path, many = tmp_path / "train.jsonl.gz", 20_000
    write_jsonl_gz(path, (json.loads(one.replace("é0002", f"x{k:06d}")) for k in range(many)))
    load_cuts(tmp_path, "train")
    batches = CutBatches(load_cuts(tmp_path, "train"), Letters(), batch_duration_s=600, seed=0)
    del batches
    tracemalloc.start()
    batches = CutBatches(load_cuts(tmp_path, "train"), Letters(), batch_duration_s=600, seed=0)
    assert len(batches.epoch(7)[3]) > 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * many
