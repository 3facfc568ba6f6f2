"""Which utterances exports are compared on, compressors calibrated on, and searches timed on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lhotse.audio import RecordingSet
from lhotse.supervision import SupervisionSet

from kdrecipe.corpus.subsets import drawn_over_speakers
from kdrecipe.data.features import compute_features, load_cuts, tuning_cuts
from kdrecipe.stages.export import compared_utterances
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.session import Session
from kdrecipe.testing.corpus import make_corpus

FEATURES = {"name": "fbank", "num_mel_bins": 80, "speed_perturb": [0.9, 1.0]}
SPLITS = {"train": 3, "dev": 4, "test": 2}  # speakers of each


def prepared(directory: Path, splits: dict[str, int]) -> Layout:
    """Features of a corpus whose splits have so many speakers, 5 utterances each, one after the other."""
    root = make_corpus(directory / "corpus", num_speakers=sum(SPLITS.values()), utterances_per_speaker=5)
    recordings = [r for s in SPLITS for r in RecordingSet.from_file(root / f"{s}_recordings.jsonl.gz")]
    supervisions = [s for p in SPLITS for s in SupervisionSet.from_file(root / f"{p}_supervisions.jsonl.gz")]
    speakers = sorted({s.speaker for s in supervisions})
    layout = Layout(directory / "exp")
    layout.manifests.mkdir(parents=True)
    for split, num in splits.items():
        mine, speakers = speakers[:num], speakers[num:]
        said = sorted((s for s in supervisions if s.speaker in mine), key=lambda s: s.speaker)
        ids = {s.recording_id for s in said}
        of_split = RecordingSet.from_recordings(r for r in recordings if r.id in ids)
        of_split.to_file(layout.manifests / f"{split}_recordings.jsonl.gz")
        SupervisionSet.from_segments(said).to_file(layout.manifests / f"{split}_supervisions.jsonl.gz")
    compute_features(layout.manifests, layout.features, FEATURES)
    return layout


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return prepared(tmp_path_factory.mktemp("with_dev"), SPLITS)


@pytest.fixture(scope="module")
def without_dev(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    splits = {split: num for split, num in SPLITS.items() if split != "dev"}
    return prepared(tmp_path_factory.mktemp("without_dev"), splits)


def ids_of(layout: Layout, split: str) -> dict[str, str]:
    """Utterance -> speaker."""
    cuts: Any = load_cuts(layout.features, split)
    return {cut.id: cut.supervisions[0].speaker for cut in cuts}


def test_a_small_sample_is_of_all_speakers_alike(layout: Layout) -> None:
    cuts: list[Any] = list(load_cuts(layout.features, "dev"))
    first = [cut.supervisions[0].speaker for cut in cuts[:4]]
    assert len(set(first)) == 1, "the first ones are of one speaker"
    for num in (4, 8, 10):
        found = drawn_over_speakers(cuts, num)
        each = Counter(cut.supervisions[0].speaker for cut in found)
        assert len(found) == num
        assert set(each.values()) <= {num // 4, -(-num // 4)}
        assert found == drawn_over_speakers(cuts[::-1], num), "whatever the order"
        assert found == drawn_over_speakers(cuts, 20)[:num]
    assert len({cut.supervisions[0].speaker for cut in drawn_over_speakers(cuts, 3)}) == 3
    assert drawn_over_speakers(cuts, 10) != drawn_over_speakers(cuts, 10, seed=1)
    assert {cut.id for cut in drawn_over_speakers(cuts)} == {cut.id for cut in cuts}
    assert len(drawn_over_speakers(cuts, 100)) == 20


def test_parity_is_looked_at_on_dev_over_all_its_speakers(layout: Layout) -> None:
    dev = ids_of(layout, "dev")
    found = compared_utterances(layout, 4)
    assert {dev[utterance.id] for utterance in found} == set(dev.values())
    assert all(u.text and len(u.samples_S) for u in found)
    assert not {u.id for u in compared_utterances(layout, 1000)} & set(ids_of(layout, "test"))


def test_without_dev_it_is_looked_at_on_train_as_it_was_spoken(without_dev: Layout) -> None:
    train = ids_of(without_dev, "train")
    found = {u.id for u in compared_utterances(without_dev, 1000)}
    assert len(train) == 2 * len(found), "at one other speed"
    assert found == {i for i in train if not i.endswith("_sp0.9")}
    assert {cut.id for cut in tuning_cuts(without_dev.features)} == found


def session(layout: Layout, data: str | None = None) -> Session:
    layout.tokens.mkdir(exist_ok=True)
    (layout.tokens / "left_out.json").write_text("[]")
    system: Any = SimpleNamespace(
        name="kd", data=data, unlabelled=None, labels=None, training=SimpleNamespace(batch_duration_s=8.0)
    )
    found = Session(None, layout, system, 1)  # type: ignore[arg-type]
    found.__dict__["tokens"] = SimpleNamespace(encode=lambda text: [3] * len(text))
    return found


def test_compressors_are_calibrated_on_dev_over_all_its_speakers(layout: Layout) -> None:
    dev = ids_of(layout, "dev")
    ids = [i for batch in session(layout).calibration(1) for i in batch.ids]
    assert set(ids) < set(dev), "one batch is not all of it"
    assert {dev[i] for i in ids} == set(dev.values())
    assert ids == [i for batch in session(layout).calibration(1) for i in batch.ids]
    assert {i for batch in session(layout).calibration(100) for i in batch.ids} == set(dev)


def test_without_dev_they_are_calibrated_on_what_the_system_may_see(without_dev: Layout) -> None:
    train = ids_of(without_dev, "train")
    speaker = min(train.values())
    few = [i for i, s in train.items() if s == speaker]
    (without_dev.features / "subsets.json").write_text(json.dumps({"few": few}))
    limited = session(without_dev, "few")
    assert {i for batch in limited.calibration(100) for i in batch.ids} == set(few)
    everyone = [i for batch in session(without_dev).calibration(1) for i in batch.ids]
    assert {train[i] for i in everyone} == set(train.values())
