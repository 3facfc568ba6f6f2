"""Features: cuts, perturbed copies, statistics, subsets, and what is refused."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import soundfile
from lhotse.array import TemporalArray
from lhotse.audio import Recording, RecordingSet
from lhotse.cut import CutSet
from lhotse.features.kaldi.extractors import Fbank, FbankConfig
from lhotse.supervision import SupervisionSegment, SupervisionSet

from kdrecipe.artifacts import write_jsonl_gz
from kdrecipe.corpus.subsets import choose_subsets, read_ids
from kdrecipe.data.features import (
    FRAME_SHIFT_S,
    SplitCuts,
    compute_features,
    extract,
    feature_stats,
    load_cuts,
    load_norm,
    perturb_speed,
    read_cuts,
)
from kdrecipe.errors import DataError, KdrecipeError, RecipeError
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.testing.corpus import make_corpus, speak

CONFIG = {"name": "fbank", "num_mel_bins": 40, "speed_perturb": [0.9, 1.0, 1.1]}
SUBSETS = {"rest": {"except": "few"}, "few": {"speakers": 2}, "half": {"fraction": 0.5}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), num_speakers=6, utterances_per_speaker=2)


@pytest.fixture(scope="module")
def features(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    compute_features(corpus, out, CONFIG, subsets=SUBSETS, seed=3)
    return out


def test_training_cuts_have_copies_of_their_own_with_features_of_their_own(features):
    cuts = {cut.id: cut for cut in load_cuts(features, "train")}
    originals = [i for i in cuts if "_sp" not in i]
    assert len(originals) == 8
    assert set(cuts) == {i + suffix for i in originals for suffix in ("", "_sp0.9", "_sp1.1")}
    for i in originals:
        slow, plain, fast = (cuts[j].load_features() for j in (f"{i}_sp0.9", i, f"{i}_sp1.1"))
        assert len(plain) / len(slow) == pytest.approx(0.9, abs=0.02)
        assert len(plain) / len(fast) == pytest.approx(1.1, abs=0.02)
        assert cuts[f"{i}_sp0.9"].supervisions[0].text == cuts[i].supervisions[0].text
        assert plain.dtype == np.float32
        assert plain.shape[1] == 40


def test_other_splits_have_no_copies(features):
    assert not any("_sp" in cut.id for split in ("dev", "test") for cut in load_cuts(features, split))


def test_stored_features_are_those_of_the_audio_not_normalised(features):
    cut = next(iter(load_cuts(features, "dev")))
    samples = cut.load_audio()[0]
    np.testing.assert_array_equal(cut.load_features(), extract(samples, SAMPLE_RATE, CONFIG))
    assert len(cut.load_features()) == round(cut.duration / FRAME_SHIFT_S)


def test_cuts_are_those_of_lhotse_with_paths_below_the_folder(features):
    stored = CutSet.from_file(features / "train.jsonl.gz")
    folder = features.absolute()
    wanted = [cut.with_features_path_prefix(folder).with_recording_path_prefix(folder) for cut in stored]
    assert list(load_cuts(features, "train")) == wanted


@pytest.mark.parametrize("num_samples", [959_999, 960_000, 960_080, 960_161, 2_000_007])
def test_long_audio_has_lhotses_features_part_by_part(num_samples: int) -> None:
    samples = (0.1 * np.random.default_rng(0).standard_normal(num_samples)).astype(np.float32)
    expected = Fbank(FbankConfig(num_filters=40)).extract(samples[None], SAMPLE_RATE)
    np.testing.assert_allclose(extract(samples, SAMPLE_RATE, CONFIG), expected, atol=1e-4)


def test_statistics_are_of_the_unperturbed_training_cuts(features):
    frames = np.concatenate([c.load_features() for c in load_cuts(features, "train") if "_sp" not in c.id])
    mean, std = load_norm(features)
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, frames.std(0), rtol=1e-3)


def test_statistics_of_a_part_are_of_that_part_only(features):
    ids = {c.id for c in load_cuts(features, "train")}
    part = set(sorted(ids)[: len(ids) // 2])
    cuts = [c for c in load_cuts(features, "train") if c.id in part and "_sp" not in c.id]
    mean, _ = load_norm(features, part)
    np.testing.assert_array_equal(mean, feature_stats(cuts)[0])
    assert not np.allclose(mean, load_norm(features)[0])
    np.testing.assert_allclose(load_norm(features, ids)[1], load_norm(features)[1])


def test_two_processes_give_what_one_gives(corpus, features, tmp_path):
    many = make_corpus(tmp_path / "corpus", num_speakers=10, utterances_per_speaker=8)
    plain = {"name": "fbank", "num_mel_bins": 40, "speed_perturb": [1.0]}
    one = compute_features(many, tmp_path / "one", plain)
    calls = []
    two = compute_features(many, tmp_path / "two", plain, num_jobs=2, on_progress=lambda *n: calls.append(n))
    for split in one:
        assert [c.id for c in one[split]] == [c.id for c in two[split]]
        for a, b in zip(one[split], two[split], strict=True):
            np.testing.assert_array_equal(a.load_features(), b.load_features())
    assert calls[-1] == (80, 80)


def test_subsets_hold_the_copies_and_part_the_speakers(features):
    subsets = json.loads((features / "subsets.json").read_text())
    train = {cut.id: cut for cut in load_cuts(features, "train")}
    assert set(subsets["few"]) | set(subsets["rest"]) == set(train)
    speakers = [{train[i].supervisions[0].speaker for i in subsets[name]} for name in ("few", "rest")]
    assert len(speakers[0]) == 2
    assert not speakers[0] & speakers[1]
    assert len(subsets["half"]) == 4 * 3
    assert all(i + "_sp0.9" in subsets["few"] for i in subsets["few"] if "_sp" not in i)


def test_subsets_are_nested_and_hang_on_the_seed_not_on_the_order(corpus):
    cuts = read_cuts(corpus, "train")
    rules = {f"u{n}": {"utterances": n} for n in (2, 5)} | {"h": {"hours": 4 / 3600}}
    chosen = choose_subsets(cuts, rules, 0)
    assert set(chosen["u2"]) < set(chosen["u5"])
    assert {k: set(v) for k, v in choose_subsets(cuts[::-1], rules, 0).items()} == {
        k: set(v) for k, v in chosen.items()
    }
    assert any(choose_subsets(cuts, rules, seed) != chosen for seed in (1, 2, 3))
    durations = {c.id: c.duration for c in cuts}
    total = sum(durations[i] for i in chosen["h"])
    assert 4 <= total < 4 + max(durations.values())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": {"speakers": 99}}, "asks for 99 speakers"),
        ({"a": {"hours": 99}}, "asks for 99 hours"),
        ({"a": {"utterances": 0}}, "asks for 0"),
        ({"a": {"except": "b"}, "b": {"except": "a"}}, "each other: a, b"),
        ({"a": {"except": "a"}}, "each other: a"),
        ({"a": {"words": 3}}, "not a rule"),
    ],
)
def test_subsets_that_can_not_be_made(corpus, rules, message):
    with pytest.raises(DataError, match=message):
        choose_subsets(read_cuts(corpus, "train"), rules, 0)


def test_a_subset_can_be_listed(corpus, tmp_path):
    cuts = read_cuts(corpus, "train")
    wanted = [cuts[5].id, cuts[2].id]
    (tmp_path / "list.txt").write_text(f"{wanted[0]} SOME WORDS\n\n{wanted[1]}\nelsewhere-1\n", "utf-8")
    chapter = tmp_path / "part" / "17" / "4"
    chapter.mkdir(parents=True)
    (chapter / "17-4.trans.txt").write_text(f"{wanted[0]} SOME WORDS\n")
    (chapter / "17-5.trans.txt").write_text(f"{wanted[1]} MORE\n")
    (chapter / "notes.txt").write_text(f"{cuts[0].id} IS NO TRANSCRIPT\n")
    for path in ("list.txt", "part"):
        rules = {"some": {"listed_in": str(tmp_path / path)}, "others": {"except": "some"}}
        chosen = choose_subsets(cuts, rules, 0)
        assert chosen["some"] == [cuts[2].id, cuts[5].id]
        assert sorted(chosen["some"] + chosen["others"]) == sorted(c.id for c in cuts)
    assert read_ids(tmp_path / "list.txt") == sorted([*wanted, "elsewhere-1"])


def test_lists_that_are_of_no_use(corpus, tmp_path):
    cuts = read_cuts(corpus, "train")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Müller-1 WORDS\n".encode("latin-1"))
    (tmp_path / "others.txt").write_text("b-2 WORDS\na-1 WORDS\n")
    told = {
        "absent.txt": "no such file or directory",
        "empty": r"no \*.trans.txt below this directory",
        "blank.txt": "an empty list",
        "latin.txt": "not UTF-8",
        "others.txt": rf"2 utterances \(such as 'a-1'\), none of which is among .* {len(cuts)} \(such as",
    }
    for name, message in told.items():
        with pytest.raises(DataError, match=message):
            choose_subsets(cuts, {"some": {"listed_in": str(tmp_path / name)}}, 0)


def test_changing_the_speed_of_cuts_with_arrays_is_refused(features):
    cut = next(iter(load_cuts(features, "train")))
    with pytest.raises(DataError, match="features"):
        perturb_speed(cut, 0.9)
    bare = cut.drop_features()
    assert perturb_speed(bare, 0.9).id == cut.id + "_sp0.9"
    array = TemporalArray(array=None, temporal_dim=0, frame_shift=0.04, start=0.0)
    array.storage_path = "somewhere"
    bare.custom = {"teacher": array}
    with pytest.raises(DataError, match="teacher"):
        perturb_speed(bare, 0.9)


def test_a_long_recording_gives_a_cut_per_supervision(tmp_path):
    samples = np.concatenate([speak("RED"), speak("SUN")])
    soundfile.write(tmp_path / "long.wav", samples * 0.5, SAMPLE_RATE)
    recording = Recording.from_file(tmp_path / "long.wav", recording_id="long")
    first_s = len(speak("RED")) / SAMPLE_RATE
    segments = [
        SupervisionSegment("long-a", "long", 0.0, first_s, text="RED"),
        # The corpus's own end lies past the audio's by rounding.
        SupervisionSegment("long-b", "long", first_s, recording.duration - first_s + 0.01, text="SUN"),
    ]
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "train_recordings.jsonl.gz")
    SupervisionSet.from_segments(segments).to_file(tmp_path / "train_supervisions.jsonl.gz")
    compute_features(tmp_path, tmp_path / "out", {**CONFIG, "speed_perturb": [1.1]})
    cuts = {cut.id: cut for cut in load_cuts(tmp_path / "out", "train")}
    assert set(cuts) == {"long-a", "long-b", "long-a_sp1.1", "long-b_sp1.1"}
    alone = extract(speak("SUN") * 0.5, SAMPLE_RATE, CONFIG)
    # Lossy only by the wav file's 16 bits.
    assert np.abs(cuts["long-b"].load_features() - alone).mean() < 0.5


def test_every_unreadable_file_is_named(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_speakers=4, utterances_per_speaker=2)
    broken = sorted((corpus / "audio").glob("*.wav"))[:2]
    for path in broken:
        path.write_bytes(b"RIFF....")
    with pytest.raises(DataError) as caught:
        compute_features(corpus, tmp_path / "out", {**CONFIG, "speed_perturb": [1.0]})
    assert {p.where for p in caught.value.problems} == {path.stem for path in broken}
    assert not (tmp_path / "out" / "train.jsonl.gz").exists()


def test_wrong_requests_are_explained(tmp_path, features):
    with pytest.raises(DataError, match="no manifests"):
        compute_features(tmp_path, tmp_path / "out", CONFIG)
    with pytest.raises(RecipeError, match="unknown features 'mfcc'"):
        extract(np.zeros(1600), SAMPLE_RATE, {**CONFIG, "name": "mfcc"})
    with pytest.raises(DataError, match="8000 Hz"):
        extract(np.zeros(1600), 8000, CONFIG)
    with pytest.raises(KdrecipeError, match="dev, test, train"):
        load_cuts(features, "eval")


def test_stage_1_does_not_hold_the_cuts_of_a_split(tmp_path):
    """Recordings as lines, 1,000 bytes in all for each of these; a list of cuts takes three times that."""
    source = {"type": "file", "channels": [0], "source": "a.wav"}
    recordings = (
        {"id": f"r{k}", "sources": [source], "sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
        for k in range(3000)
    )
    write_jsonl_gz(tmp_path / "train_recordings.jsonl.gz", recordings)
    spoken = ({"id": f"r{k}", "recording_id": f"r{k}", "start": 0.0, "duration": 1.0} for k in range(3000))
    write_jsonl_gz(tmp_path / "train_supervisions.jsonl.gz", spoken)
    tracemalloc.start()
    assert sum(cut.duration for cut in SplitCuts(tmp_path, "train")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 3000
