"""Cached and live targets."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse.audio import Recording
from lhotse.cut import CutSet

from kdrecipe.errors import DataError, TrainingError
from kdrecipe.interfaces import Batch, TargetSpec
from kdrecipe.model.heads.attention import AttentionHead, AttentionHeadOptions
from kdrecipe.model.heads.rnnt import RnntHead, RnntHeadOptions
from kdrecipe.stages.inputs import merge_specs
from kdrecipe.targets.cache import TargetCache, write_targets
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.targets.shards import Shards, ShardWriter
from kdrecipe.testing.models import VOCAB_SIZE, WIDTH, TinyModel, random_batch, tiny_model
from kdrecipe.train.step import along_with

KEY = {"teacher": "weights-1", "tokens": "tokens-1", "features": {"num_mel_bins": 80}}
FULL = TargetSpec("frame_logits", "ctc")
TOP_3 = TargetSpec("frame_logits", "ctc", top_k=3)
HIDDEN = TargetSpec("hidden", "encoder.1")
TEXTS = TargetSpec("hypotheses", "ctc", top_k=3)
LENS = {"a": 30, "b": 22, "c": 17, "d": 9}  # feature frames


class Batches:
    """The cuts in two batches, with noise for features."""

    plan = (["a", "c"], ["b", "d"])

    def epoch(self, number):
        return [list(ids) for ids in self.plan]

    def load(self, ids) -> Batch:
        batch = random_batch([LENS[i] for i in ids], seed=sum(map(ord, ids)))
        return replace(batch, ids=list(ids))


@pytest.fixture
def cuts(tmp_path):
    import soundfile

    made = []
    for name, frames in LENS.items():
        path = tmp_path / f"{name}.wav"
        noise = np.random.default_rng(frames).standard_normal(160 * frames)
        soundfile.write(path, 0.1 * noise, 16000)
        made.append(Recording.from_file(path, recording_id=name).to_cut())
    return CutSet.from_cuts([cut.with_id(cut.recording_id) for cut in made])


def write(cuts, directory, specs=(FULL,), model=None, **options):
    model = model or tiny_model()
    return write_targets(cuts, Batches(), ModelTeacher(model), specs, directory, key_parts=KEY, **options)


def assert_equal(got, want):
    assert got.items.keys() == want.items.keys()
    for key, item in want.items.items():
        for name, value in vars(item).items():
            other = getattr(got.items[key], name)
            if value is None:
                assert other is None, (key, name)
            else:
                assert other.dtype == value.dtype, (key, name)
                assert torch.equal(other, value), (key, name)


@pytest.mark.parametrize("specs", [(FULL,), (TOP_3,), (HIDDEN,), (TOP_3, HIDDEN), (TEXTS,)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_targets_are_the_live_ones_bit_for_bit(cuts, tmp_path, specs, dtype):
    specs = [replace(spec, dtype=dtype) for spec in specs]
    write(cuts, tmp_path / "t", specs)
    cache = TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    live = LiveTargets(ModelTeacher(tiny_model()), specs)
    for _ in range(2):  # from disk, then from memory
        for ids in Batches().epoch(0):
            batch = Batches().load(ids)
            assert_equal(cache.targets(batch), live.targets(batch))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("spec", [FULL, TOP_3, replace(FULL, top_k=1)])
def test_classes_that_the_teacher_rules_out_are_stored_finite(cuts, tmp_path, spec, dtype):
    class Strict(TinyModel):
        """Rules out all but two classes."""

        def with_heads(self, out, batch):
            found = super().with_heads(out, batch)
            found.logits["ctc"][..., 2:] = -torch.inf
            return found

    model, spec = Strict().eval(), replace(spec, dtype=dtype)
    cache, live = write(cuts, tmp_path / "t", (spec,), model), LiveTargets(ModelTeacher(model), [spec])
    for ids in Batches().epoch(0):
        batch = Batches().load(ids)
        found = live.targets(batch)
        assert_equal(cache.targets(batch), found)
        target = found.posteriors()
        kept_BTK = target.log_probs_BTK.where(target.log_probs_BTK < 0, -torch.inf)  # padding is 0
        assert torch.isfinite(target.log_probs_BTK).all()
        assert float(kept_BTK.exp().sum(-1).max()) <= 1.01
        if target.log_tail_BT is not None:
            assert torch.isfinite(target.log_tail_BT).all()
            if spec.top_k == 3:  # of which one is ruled out, as all others are
                assert float(target.log_tail_BT.min()) == -1e4


def test_memory_limit_changes_nothing_but_speed(cuts, tmp_path):
    write(cuts, tmp_path / "t")
    batch = Batches().load(["a", "c"])
    small = TargetCache.open(tmp_path / "t", KEY, max_memory_bytes=400)
    want = TargetCache.open(tmp_path / "t", KEY).targets(batch)
    assert_equal(small.targets(batch), want)
    assert_equal(small.targets(batch), want)


def test_targets_are_rounded_to_the_stored_type_and_padded_with_0(cuts, tmp_path):
    target = LiveTargets(ModelTeacher(tiny_model()), [TOP_3]).targets(Batches().load(["a", "c"])).posteriors()
    assert target.log_probs_BTK.shape == (2, 8, 3)
    assert target.lens_B.tolist() == [8, 5]
    assert torch.equal(target.log_probs_BTK, target.log_probs_BTK.half().float())
    assert not target.log_probs_BTK[1, 5:].any()
    assert not target.indices_BTK[1, 5:].any()
    mass = target.log_probs_BTK.exp().sum(-1) + target.log_tail_BT.exp()
    torch.testing.assert_close(mass[0], torch.ones(8), rtol=0, atol=5e-3)


def test_top_k_of_all_classes_is_full(cuts):
    spec = replace(FULL, top_k=VOCAB_SIZE)
    batch = Batches().load(["a"])
    wide, full = (
        LiveTargets(ModelTeacher(tiny_model()), [s]).targets(batch).posteriors() for s in (spec, FULL)
    )
    assert wide.indices_BTK is None
    assert torch.equal(wide.log_probs_BTK, full.log_probs_BTK)


def test_the_teacher_is_frozen_and_in_evaluation_mode():
    class Dropping(TinyModel):
        def forward(self, features_BTF, lens_B, **more):
            return super().forward(torch.dropout(features_BTF, 0.5, self.training), lens_B, **more)

    model = Dropping().train()
    live = LiveTargets(ModelTeacher(model), [FULL])
    model.train()
    batch = Batches().load(["a", "c"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = live.targets(batch).posteriors(), live.targets(batch).posteriors()
    assert torch.equal(first.log_probs_BTK, second.log_probs_BTK)
    assert not first.log_probs_BTK.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    model.eval()
    exact = model(batch.features_BTF, batch.lens_B).logits["ctc"].log_softmax(-1)
    torch.testing.assert_close(first.log_probs_BTK[0], exact[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", list(KEY))
def test_stale_targets_are_refused_naming_the_part(cuts, tmp_path, part):
    write(cuts, tmp_path / "t")
    with pytest.raises(DataError, match=f"stale: {part} was") as caught:
        TargetCache.open(tmp_path / "t", {**KEY, part: "something else"})
    assert len(caught.value.problems) == 1
    TargetCache.open(tmp_path / "t", {part: KEY[part]})


def test_all_stale_parts_are_named_at_once(cuts, tmp_path):
    write(cuts, tmp_path / "t")
    with pytest.raises(DataError) as caught:
        TargetCache.open(tmp_path / "t", {"teacher": "2", "tokens": "2", "features": {}, "new": 1})
    assert [p.what.split(": ")[1].split(" ")[0] for p in caught.value.problems] == [
        "teacher",
        "tokens",
        "features",
        "new",
    ]


def test_needs_that_the_cache_does_not_meet_are_refused(cuts, tmp_path):
    write(cuts, tmp_path / "t", [TOP_3])
    TargetCache.open(tmp_path / "t", KEY, specs=[replace(TOP_3, top_k=2)])
    for need, text in [
        (HIDDEN, "holds no hidden:encoder.1"),
        (FULL, "best 3 classes of frame_logits:ctc, all are needed"),
        (replace(TOP_3, top_k=4), "4 are needed"),
    ]:
        with pytest.raises(DataError, match=text):
            TargetCache.open(tmp_path / "t", KEY, specs=[need])


def test_batches_that_do_not_fit_are_refused(cuts, tmp_path):
    cache = write(cuts, tmp_path / "t")
    batch = Batches().load(["a", "c"])
    with pytest.raises(DataError, match="no cached targets") as caught:
        cache.targets(replace(batch, ids=["a", "a_sp0.9"]))
    assert caught.value.problems[0].where == "a_sp0.9"
    with pytest.raises(DataError, match="16 feature frames, its cached targets were computed from 17"):
        cache.targets(replace(batch, lens_B=batch.lens_B - torch.tensor([0, 1])))


@pytest.mark.parametrize(
    "change",
    [
        lambda cut: cut.perturb_speed(0.9, affix_id=False),
        lambda cut: cut.perturb_volume(2.0, affix_id=False),
        lambda cut: cut.truncate(duration=0.05).with_id(cut.id),
    ],
    ids=["speed", "volume", "truncated"],
)
def test_cuts_perturbed_after_caching_are_refused(cuts, tmp_path, change):
    write(cuts, tmp_path / "t")
    changed = CutSet.from_cuts([change(cut) if cut.id == "b" else cut for cut in cuts])
    with pytest.raises(DataError, match=r"changed \(speed, volume, cropping\) after") as caught:
        TargetCache.open(tmp_path / "t", KEY, cuts=changed)
    assert [p.where for p in caught.value.problems] == ["b"]


def test_speed_perturbed_cuts_of_their_own_are_fine(cuts, tmp_path):
    slow = CutSet.from_cuts([cut.perturb_speed(0.9, affix_id=False) for cut in cuts])
    write(slow, tmp_path / "t")
    TargetCache.open(tmp_path / "t", KEY, cuts=slow)
    with pytest.raises(DataError, match="was changed"):
        TargetCache.open(tmp_path / "t", KEY, cuts=cuts)


def test_changed_audio_is_refused_and_a_mere_touch_is_not(cuts, tmp_path):
    write(cuts, tmp_path / "t")
    os.utime(tmp_path / "a.wav", ns=(1, 1))
    TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.wav").write_bytes(bytes(data))
    with pytest.raises(DataError, match="audio has changed") as caught:
        TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    assert [p.where for p in caught.value.problems] == ["a"]


def test_a_directory_can_be_moved(cuts, tmp_path):
    write(cuts, tmp_path / "part")
    os.replace(tmp_path / "part", tmp_path / "t")
    TargetCache.open(tmp_path / "t", KEY).targets(Batches().load(["a", "c"]))


def test_an_unfinished_cache_is_not_opened(cuts, tmp_path):
    class Dying(Batches):
        def load(self, ids):
            if "b" in ids:
                raise KeyboardInterrupt
            return super().load(ids)

    with pytest.raises(KeyboardInterrupt):
        write_targets(cuts, Dying(), ModelTeacher(tiny_model()), [FULL], tmp_path / "t", key_parts=KEY)
    with pytest.raises(ValueError, match="missing file"):
        TargetCache.open(tmp_path / "t", KEY)


def test_writing_covers_every_cut_and_reports_progress(cuts, tmp_path):
    done = []
    write(cuts, tmp_path / "t", progress=done.append)
    assert done == [2, 2]

    class Half(Batches):
        plan = (["a", "c"],)

    with pytest.raises(DataError, match="no batch holds this cut") as caught:
        write_targets(cuts, Half(), ModelTeacher(tiny_model()), [FULL], tmp_path / "u", key_parts=KEY)
    assert [p.where for p in caught.value.problems] == ["b", "d"]


def test_hidden_states_beyond_float16_are_refused(cuts, tmp_path):
    model = tiny_model()
    model.encoder.layers[1] = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.encoder.layers[1].weight.mul_(1e7)
    with pytest.raises(DataError, match="not finite as float16"):
        write(cuts, tmp_path / "t", [HIDDEN], model)
    write(cuts, tmp_path / "u", [replace(HIDDEN, dtype="float32")], model)


def test_unknown_kinds_are_refused():
    with pytest.raises(DataError, match="thoughts"):
        LiveTargets(ModelTeacher(tiny_model()), [TargetSpec("thoughts", "encoder.0")])


def test_a_model_alone_has_no_codebooks():
    live = LiveTargets(ModelTeacher(tiny_model()), [TargetSpec("codebooks", "encoder.0", 2)])
    with pytest.raises(DataError, match="codebooks that are trained on the teacher's hidden states"):
        live.targets(random_batch())


def test_merged_specs_serve_everybody():
    merged = merge_specs([TOP_3, HIDDEN, replace(TOP_3, top_k=5, dim=6), replace(HIDDEN, dtype="float32")])
    assert merged == [replace(TOP_3, top_k=5, dim=6), replace(HIDDEN, dtype="float32")]
    need = replace(HIDDEN, align="mean")
    assert merge_specs([need, HIDDEN]) == merge_specs([HIDDEN, need]) == [need]
    assert merge_specs([TOP_3, FULL]) == merge_specs([FULL, TOP_3]) == [FULL]


def test_arrays_lie_in_shards_in_half_precision(cuts, tmp_path):
    write(cuts, tmp_path / "t", [TOP_3])
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["00000.bin", "index.jsonl", "key.json"]
    arrays = Shards(tmp_path / "t").arrays("a", "frame_logits:ctc/")
    assert (arrays["log_probs"].shape, arrays["log_probs"].dtype) == ((8, 3), np.float16)
    assert arrays["indices"].dtype == np.int16
    assert json.loads((tmp_path / "t" / "key.json").read_text())["parts"] == KEY


def test_a_killed_writer_resumes_and_leaves_the_same_bytes(cuts, tmp_path):
    class Dying(Batches):
        def load(self, ids):
            if "b" in ids:
                raise KeyboardInterrupt
            return super().load(ids)

    class Counting(Batches):
        loaded = 0

        def load(self, ids):
            self.loaded += 1
            return super().load(ids)

    write(cuts, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write_targets(cuts, Dying(), ModelTeacher(tiny_model()), [FULL], tmp_path / "t", key_parts=KEY)
    with (
        open(tmp_path / "t" / "index.jsonl", "ab") as index,
        open(tmp_path / "t" / "00000.bin", "ab") as data,
    ):
        index.write(b'{"id": "b", "arr')
        data.write(b"half an array")
    counting = Counting()
    write_targets(cuts, counting, ModelTeacher(tiny_model()), [FULL], tmp_path / "t", key_parts=KEY)
    assert counting.loaded == 1
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes(), path.name


def test_damaged_bytes_are_found_when_they_are_read(cuts, tmp_path):
    write(cuts, tmp_path / "t")
    cache = TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    data = bytearray((tmp_path / "t" / "00000.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "t" / "00000.bin").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"00000.bin is damaged: bytes 0 to") as caught:
        cache.targets(Batches().load(["a", "c"]))
    assert caught.value.problems[0].where == "a"
    cache.targets(Batches().load(["b", "d"]))


def test_full_shards_are_followed_by_others(tmp_path):
    arrays = [np.arange(n, dtype=np.float32) for n in (10, 300, 5, 0, 90)]

    def write_all(directory, stop=None):
        with ShardWriter(directory, shard_bytes=400) as writer:
            for number, array in enumerate(arrays[:stop]):
                if str(number) not in writer.written:
                    writer.add([({"id": str(number)}, {"x/a": array, "x/b": array[:1]})])

    write_all(tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").glob("*.bin")) == [f"{n:05d}.bin" for n in range(3)]
    shards = Shards(tmp_path / "t")
    for number, array in enumerate(arrays):
        assert np.array_equal(shards.arrays(str(number), "x/")["a"], array)
    assert shards.arrays("0", "y/") == {}
    for stop in range(len(arrays)):  # in pieces: the same bytes
        write_all(tmp_path / f"s{stop}", stop)
        write_all(tmp_path / f"s{stop}")
        for path in (tmp_path / "t").iterdir():
            assert path.read_bytes() == (tmp_path / f"s{stop}" / path.name).read_bytes(), (stop, path.name)


# ---------------------------------------------------------------- along a text

TOKEN = TargetSpec("token_logits", "attention", dtype="float32")
TOKEN_3 = replace(TOKEN, top_k=3, dtype="float16")
LATTICE = TargetSpec("rnnt_lattice", "rnnt", dtype="float32")


def speaker(seed=0):
    """A teacher with a decoder, a transducer and a CTC head, which it is judged by."""
    torch.manual_seed(seed)
    attention = AttentionHead(AttentionHeadOptions(num_layers=1, dim=4, num_heads=2), WIDTH, VOCAB_SIZE)
    rnnt = RnntHead(RnntHeadOptions(predictor_dim=4, joiner_dim=4), WIDTH, VOCAB_SIZE)
    model = TinyModel(heads={"attention": attention, "rnnt": rnnt})
    return model.eval()


def withheld(batch, *rows):
    """The batch without the labels of these rows, as a student's that has not got them."""
    labelled = batch.labelled_B.clone()
    labelled[list(rows)] = False
    tokens, lens = batch.tokens_BU.clone(), batch.token_lens_B.clone()
    tokens[list(rows)], lens[list(rows)] = 0, 0
    return replace(batch, labelled_B=labelled, tokens_BU=tokens, token_lens_B=lens)


@pytest.mark.parametrize("specs", [(TOKEN,), (TOKEN_3, FULL), (LATTICE, HIDDEN), (LATTICE, TOKEN)])
def test_targets_along_a_text_are_the_same_cached_and_live(cuts, tmp_path, specs):
    model = speaker()
    write(cuts, tmp_path / "t", specs, model, own_ids={"c", "b"})
    cache = TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    live = LiveTargets(ModelTeacher(model), specs)
    for ids, hidden_rows in ((["a", "c"], ()), (["a", "c"], (1,)), (["b", "d"], (0,))):
        batch = withheld(Batches().load(ids), *hidden_rows)
        got, want = cache.targets(batch), live.targets(batch)
        assert torch.equal(got.tokens_BU, want.tokens_BU)
        assert torch.equal(got.token_lens_B, want.token_lens_B)
        for key, item in want.items.items():
            for name, value in vars(item).items():
                if value is not None:
                    # along other texts the batch has another shape, and products another rounding
                    torch.testing.assert_close(getattr(got.items[key], name), value, atol=2e-3, rtol=0)


def test_unlabelled_utterances_are_spoken_along_the_teachers_own_words():
    model = speaker()
    batch = Batches().load(["a", "c"])
    out = model.encode(batch.features_BTF, batch.lens_B)
    own = model.greedy(out.select(torch.tensor([False, True])))[0]
    found = LiveTargets(ModelTeacher(model), [TOKEN, LATTICE]).targets(withheld(batch, 1))
    assert found.tokens_BU[1, : int(found.token_lens_B[1])].tolist() == own
    assert found.tokens_BU[0, : int(found.token_lens_B[0])].tolist() == batch.tokens_BU[0].tolist()[:1]
    assert found.posteriors("attention", "token_logits").lens_B.tolist() == [2, len(own) + 1]
    assert found.lattice().token_lens_B.tolist() == [1, len(own)]
    # the transcript's tokens must not shine through
    other = replace(batch, tokens_BU=torch.full_like(batch.tokens_BU, 4))
    again = LiveTargets(ModelTeacher(model), [TOKEN]).targets(withheld(other, 0, 1))
    assert torch.equal(
        again.tokens_BU, LiveTargets(ModelTeacher(model), [TOKEN]).targets(withheld(batch, 0, 1)).tokens_BU
    )


def test_a_text_that_the_cache_does_not_go_along_is_refused(cuts, tmp_path):
    write(cuts, tmp_path / "t", [TOKEN], speaker(), own_ids={"c"})
    cache = TargetCache.open(tmp_path / "t", KEY, cuts=cuts)
    batch = Batches().load(["a", "c"])
    cache.targets(withheld(batch, 1))
    with pytest.raises(DataError, match=r"a: .*do not follow the teacher's own hypothesis"):
        cache.targets(withheld(batch, 0))
    changed = replace(batch, tokens_BU=batch.tokens_BU.where(batch.tokens_BU == 0, 5))
    changed.tokens_BU[0, 0] = 4 if int(batch.tokens_BU[0, 0]) != 4 else 3
    with pytest.raises(DataError, match="a: its cached targets follow another text than its label"):
        cache.targets(changed)


def test_students_go_along_with_their_teachers_words():
    model = speaker()
    batch = withheld(Batches().load(["a", "c"]), 1)
    targets = {"t": LiveTargets(ModelTeacher(model), [TOKEN]).targets(batch)}
    along = along_with(batch, targets)
    assert torch.equal(along.tokens_BU, targets["t"].tokens_BU)
    assert along.labelled_B.tolist() == [True, False]
    other = {**targets, "u": LiveTargets(ModelTeacher(speaker(5)), [TOKEN]).targets(batch)}
    other["u"].tokens_BU = other["u"].tokens_BU + 1
    with pytest.raises(TrainingError, match="t and u hear different words"):
        along_with(batch, other)
