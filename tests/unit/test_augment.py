"""Scenes of utterances: what is where in them, what covers them, and what teachers said about each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.cut import CutSet

from kdrecipe.data.augment import Augmenter, NoiseFiles, num_frames
from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import compute_features, extract, load_cuts
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import FRAME_SAMPLES, Batch, Piece, TargetSpec
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.sections import Augment
from kdrecipe.targets.cache import TargetCache, write_targets
from kdrecipe.targets.live import ModelTeacher
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.testing.models import TinyEncoder, TinyModel

NOTHING = {"silence": 0, "join": 0, "gain": 0, "reverb": 0, "noise": 0}
FBANK = {"name": "fbank", "num_mel_bins": 80}


def speech(num_samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def scene_of(made, utterances, seed=0):
    [scene] = made.scenes([utterances], np.random.default_rng(seed))
    return scene


def augmenter(grid=4, **changes):
    return Augmenter(Augment(**{**NOTHING, **changes}), grid)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 30_000), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 1000),
)
def test_utterances_stand_unchanged_where_the_scene_says(lens, grid, seed):
    utterances = [speech(n, seed + i) for i, n in enumerate(lens)]
    scene = scene_of(augmenter(grid, silence=1.0), utterances, seed)
    end = 0
    for utterance, (start, frames) in zip(utterances, scene.frames, strict=True):
        assert start % grid == 0
        assert start * FRAME_SAMPLES >= end
        end = start * FRAME_SAMPLES + len(utterance)
        np.testing.assert_array_equal(scene.samples_S[start * FRAME_SAMPLES : end], utterance)
        assert frames == num_frames(len(utterance))
    after = num_frames(len(scene.samples_S)) - sum(scene.frames[-1])
    assert after % grid == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.1, 9.0), min_size=1, max_size=12),
    st.floats(1.0, 20.0),
    st.integers(0, 1000),
)
def test_rows_hold_each_utterance_once_and_last_no_longer_than_they_may(durations_s, join_s, seed):
    rows = augmenter(join=1.0, join_s=join_s).rows(durations_s, np.random.default_rng(seed))
    assert sorted(i for row in rows for i in row) == list(range(len(durations_s)))
    for row in rows:
        assert len(row) == 1 or sum(durations_s[i] for i in row) <= join_s


def test_nothing_of_it_leaves_an_utterance_as_it_is():
    scene = scene_of(augmenter(), [speech(5000)], 0)
    np.testing.assert_array_equal(scene.samples_S, speech(5000))
    assert scene.frames == ((0, 31),)


def test_noise_lies_so_far_below_the_speech():
    for db in (0.0, 20.0):
        scene = scene_of(augmenter(noise=1.0, snr_db=(db, db)), [speech(16000)], 1)
        noise = scene.samples_S - speech(16000)
        ratio = 10 * np.log10(np.mean(speech(16000) ** 2) / np.mean(noise**2))
        assert ratio == pytest.approx(db, abs=0.01)


def test_gain_changes_the_level_and_nothing_else():
    scene = scene_of(augmenter(gain=1.0, gain_db=(-20.0, -20.0)), [speech(5000)], 0)
    np.testing.assert_allclose(scene.samples_S, 0.1 * speech(5000), rtol=1e-5)


def test_a_room_keeps_the_length():
    scene = scene_of(augmenter(reverb=1.0), [speech(5000)], 0)
    assert len(scene.samples_S) == 5000
    assert not np.allclose(scene.samples_S, speech(5000))


def test_silence_is_digital_at_times_and_else_no_louder_than_the_noise_of_the_utterance():
    levels = []
    for seed in range(40):
        scene = scene_of(augmenter(silence=1.0, silence_s=(0.5, 0.5)), [speech(8000)], seed)
        start = scene.frames[0][0] * FRAME_SAMPLES
        silence = np.delete(scene.samples_S, np.s_[start : start + 8000])
        assert len(silence) == 48 * FRAME_SAMPLES
        levels.append(float(np.sqrt(np.mean(silence**2))))
    assert 5 <= levels.count(0.0) <= 22
    assert max(levels) <= 0.1 * 10 ** (6 / 20)  # 3 dB, and made noises swell


def test_silence_makes_all_rows_of_a_batch_end_together():
    rows = [[speech(5000)], [speech(9000), speech(700)], [speech(12345)]]
    ends = set()
    for seed in range(10):
        scenes = augmenter(silence=1.0, silence_s=(1.0, 2.0)).scenes(rows, np.random.default_rng(seed))
        lens = [num_frames(len(scene.samples_S)) for scene in scenes]
        assert max(lens) - min(lens) < 4  # within a frame of the encoder
        assert 77 + 100 <= max(lens) <= 77 + 50 + 9 + 200
        ends.add(max(lens))
    assert len(ends) > 5


def test_one_sample_and_digital_silence_make_scenes(tmp_path):
    options = dict.fromkeys(NOTHING, 1.0)
    for utterance in (np.zeros(1, np.float32), np.zeros(16000, np.float32), speech(1)):
        for seed in range(5):
            scene = scene_of(augmenter(**options), [utterance, utterance], seed)
            assert np.isfinite(scene.samples_S).all()


def test_noise_from_files_at_any_rate_and_length(tmp_path):
    soundfile.write(tmp_path / "short.wav", speech(800), 8000)
    noise = NoiseFiles(tmp_path)(40000, np.random.default_rng(0))
    assert noise.shape == (40000,)
    assert 0.05 < np.std(noise) < 0.15


def test_a_directory_without_noise_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(DataError, match="no WAV or FLAC"):
        NoiseFiles(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFFnonsense")
    with pytest.raises(DataError, match=r"a\.wav"):
        NoiseFiles(tmp_path)(100, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"gain_db": (5, -5)}, "lower end first"), ({"silence_s": (-1, 2)}, "0 or more"), ({"noise": 1.5}, "1")],
)
def test_impossible_options_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Augment(**changes)


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Cuts of a small corpus with features, and its tokens."""
    root = tmp_path_factory.mktemp("spoken")
    corpus = make_corpus(root / "corpus", num_speakers=3, utterances_per_speaker=8)
    compute_features(corpus, root / "features", {**FBANK, "speed_perturb": [1.0]})
    cuts = list(load_cuts(root / "features", "train"))
    return cuts, Tokenizer.train([c.supervisions[0].text for c in cuts], "char", None, root)


def batches(spoken, labelled=None, **changes):
    return CutBatches(
        spoken[0],
        spoken[1],
        batch_duration_s=1000.0,
        seed=0,
        labelled_ids=labelled,
        augmenter=augmenter(**changes),
        extract=lambda samples_S: extract(samples_S, 16000, FBANK),
    )


def test_unchanged_scenes_have_the_stored_features(spoken):
    made = batches(spoken)
    for cut_id in made.ids:
        stored, scene = made.load([cut_id]), made.load_augmented([cut_id], (1,))
        assert scene.pieces == [(Piece(cut_id, 0, int(stored.lens_B)),)]
        torch.testing.assert_close(scene.features_BTF, stored.features_BTF, rtol=0, atol=0.05)
        assert scene.tokens_BU.tolist() == stored.tokens_BU.tolist()


def test_joined_rows_have_the_words_of_all_and_labels_only_where_all_have(spoken):
    ids = batches(spoken).ids
    made = batches(spoken, set(ids[:5]), join=1.0, join_s=1000.0)
    batch = made.load_augmented(ids, (3,))
    assert sorted(p.id for row in batch.pieces for p in row) == sorted(ids)
    assert batch.labelled_B.any()
    assert not batch.labelled_B.all()
    texts = {cut.id: cut.supervisions[0].text for cut in spoken[0]}
    for row, pieces in enumerate(batch.pieces):
        members = [piece.id for piece in pieces]
        assert batch.ids[row] == "+".join(members)
        assert {m in ids[:5] for m in members} == {bool(batch.labelled_B[row])}
        if batch.labelled_B[row]:
            assert batch.texts[row] == " ".join(texts[m] for m in members)
            said = batch.tokens_BU[row, : batch.token_lens_B[row]].tolist()
            assert said == spoken[1].encode(batch.texts[row])


def test_a_scene_depends_on_its_seed_alone(spoken):
    every = dict.fromkeys(NOTHING, 0.5)
    first, again, other = (batches(spoken, **every) for _ in range(3))
    ids = first.ids[:4]
    other.load_augmented(ids, (9, 9))
    batch = first.load_augmented(ids, (1, 2))
    for same in (again, other):
        assert torch.equal(batch.features_BTF, same.load_augmented(ids, (1, 2)).features_BTF)
    assert batch.features_BTF.shape != first.load_augmented(ids, (1, 3)).features_BTF.shape


@pytest.mark.parametrize("num_samples", [1, 100, 399, 400, 5000])
def test_an_utterance_has_as_many_frames_in_a_scene_as_in_stage_1(spoken, num_samples):
    cut = SimpleNamespace(
        id="short",
        duration=num_samples / 16000,
        has_features=True,
        supervisions=[],
        load_audio=lambda: speech(num_samples)[None],
    )
    batch = batches(([cut], spoken[1])).load_augmented(["short"], (0,))
    stored = extract(speech(num_samples), 16000, FBANK)
    assert [piece.num_frames for piece in batch.pieces[0]] == batch.lens_B.tolist() == [len(stored)]


def test_select_and_repeat_keep_the_pieces():
    pieces = [(Piece("a", 4, 10),), (Piece("b", 0, 9), Piece("c", 12, 3))]
    ones = torch.ones(2, dtype=torch.int64)
    batch = Batch(
        ["a", "b+c"], torch.zeros(2, 20, 3), ones, ones[:, None], ones, ones.bool(), ["", ""], pieces
    )
    assert batch.select(torch.tensor([False, True])).pieces == pieces[1:]
    assert batch.repeat(2).pieces == pieces * 2
    assert replace(batch, pieces=[]).pieces_of(1) == (Piece("b+c", 0, 1),)


# ---------------------------------------------------------------- cached targets


@pytest.fixture(scope="module")
def cached(spoken, tmp_path_factory):
    specs = [
        TargetSpec("frame_logits", "ctc", frame_shift_s=0.04),
        TargetSpec("hidden", "encoder.1", frame_shift_s=0.04),
    ]
    torch.manual_seed(0)
    model = TinyModel(TinyEncoder(TinyEncoder.Config(), 80)).eval()
    made = batches(spoken)
    out = tmp_path_factory.mktemp("targets")
    write_targets(CutSet.from_cuts(spoken[0]), made, ModelTeacher(model), specs, out, key_parts={})
    return TargetCache.open(out, {}), model


@pytest.mark.parametrize("seed", range(4))
def test_cached_targets_follow_their_utterances_and_are_blank_between_them(spoken, cached, seed):
    cache, model = cached
    made = batches(spoken, join=1.0, join_s=1000.0, silence=1.0)
    batch = made.load_augmented(made.ids, (seed,))
    found = cache.targets(batch)
    with torch.no_grad():
        out = model.encode(batch.features_BTF, batch.lens_B)
    assert found.posteriors().lens_B.tolist() == out.lens_B.tolist()  # as many frames as the student has
    assert found.hidden("encoder.1").lens_B.tolist() == out.lens_B.tolist()
    for row, pieces in enumerate(batch.pieces):
        probs_TV = found.posteriors().log_probs_BTK[row, : out.lens_B[row]].exp()
        torch.testing.assert_close(probs_TV.sum(-1), torch.ones(len(probs_TV)), rtol=0, atol=0.01)
        silent_T = torch.ones(len(probs_TV), dtype=torch.bool)
        for piece in pieces:
            alone = cache.targets(made.load([piece.id]))
            frames = slice(piece.start // 4, piece.start // 4 + int(alone.posteriors().lens_B))
            assert torch.equal(
                found.posteriors().log_probs_BTK[row, frames], alone.posteriors().log_probs_BTK[0]
            )
            assert torch.equal(
                found.hidden("encoder.1").values_BTD[row, frames], alone.hidden("encoder.1").values_BTD[0]
            )
            silent_T[frames] = False
        assert bool((probs_TV[silent_T, 0] == 1).all())


def test_top_k_targets_of_silence_keep_each_class_once(spoken, tmp_path):
    spec = TargetSpec("frame_logits", "ctc", frame_shift_s=0.04, top_k=3)
    made = batches(spoken, silence=1.0, silence_s=(0.4, 0.5))
    model = TinyModel(TinyEncoder(TinyEncoder.Config(), 80)).eval()
    cache = write_targets(
        CutSet.from_cuts(spoken[0]), made, ModelTeacher(model), [spec], tmp_path, key_parts={}
    )
    target = cache.targets(made.load_augmented(made.ids[:2], (0,))).posteriors()
    assert target.indices_BTK[0, 0].tolist() == [0, 1, 2]
    assert target.log_probs_BTK[0, 0].tolist() == [0.0, -1e4, -1e4]
    assert float(target.log_tail_BT[0, 0]) == -1e4


def test_targets_between_two_frames_are_refused(spoken, cached):
    made = batches(spoken)
    batch = made.load([made.ids[0]])
    shifted = replace(batch, lens_B=batch.lens_B + 2, pieces=[(Piece(made.ids[0], 2, int(batch.lens_B)),)])
    with pytest.raises(DataError, match="within a frame"):
        cached[0].targets(shifted)


def test_joining_beside_cached_targets_that_follow_a_text_is_found_before_any_work():
    heads = Path(__file__).parents[2] / "recipes" / "an4" / "heads"
    with pytest.raises(RecipeError) as found:
        load_recipe(heads, overrides=["training.augment={}"])
    said = str(found.value)
    assert "'rnnt_kl' learns from cached rnnt_lattice" in said
    assert "'kl' learns from cached token_logits" in said
    assert "training.augment.join" in said
    for allowed in ("training.augment={join: 0}", "targets.mode=live"):
        load_recipe(heads, overrides=["training.augment.join=0", allowed])
