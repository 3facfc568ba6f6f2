"""Batches: plans by (seed, epoch) alone, padding, labels, the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import compute_features
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError
from kdrecipe.testing.corpus import make_corpus


@dataclass
class FakeCut:
    """What :class:`CutBatches` uses of a cut."""

    id: str
    duration: float
    text: str = "A"
    has_features: bool = True
    reads: list[str] = field(default_factory=list)

    @property
    def supervisions(self):
        return [SimpleNamespace(text=self.text)]

    @property
    def features(self):
        return SimpleNamespace(load=self.load_features)

    def load_features(self):
        self.reads.append(self.id)
        number = int(self.id.removeprefix("c"))
        return np.full((round(self.duration * 100), 4), float(number), dtype=np.float32)


class FakeTokens:
    vocab_id = "fake"

    def __len__(self):
        return 30

    def encode(self, text):
        return [ord(letter) - ord("A") + 3 for letter in text]

    def decode(self, ids):
        return "".join(chr(i - 3 + ord("A")) for i in ids)


def make(durations, **options):
    cuts = [FakeCut(f"c{i}", d, "AB"[: 1 + i % 2]) for i, d in enumerate(durations)]
    options = {"batch_duration_s": 20.0, "seed": 1, **options}
    return CutBatches(cuts, FakeTokens(), **options)


DURATIONS = list(np.random.default_rng(0).uniform(0.5, 8.0, 200))


def test_a_plan_holds_every_cut_once_and_hangs_on_seed_and_epoch():
    batches = make(DURATIONS)
    plan = batches.epoch(3)
    assert sorted(i for ids in plan for i in ids) == sorted(batches.ids)
    batches.epoch(0)
    assert batches.epoch(3) == plan == make(DURATIONS).epoch(3)
    assert batches.epoch(4) != plan
    assert make(DURATIONS, seed=2).epoch(3) != plan


def test_neighbours_change_from_epoch_to_epoch():
    batches = make(DURATIONS)
    pairs = [{frozenset((a, b)) for ids in batches.epoch(n) for a in ids for b in ids} for n in (0, 1)]
    assert len(pairs[0] & pairs[1]) < 0.8 * len(pairs[0])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=80), st.integers(0, 5))
def test_batches_stay_within_their_duration(durations, epoch):
    batches = make(durations)
    lengths = dict(zip(batches.ids, durations, strict=True))
    plan = batches.epoch(epoch)
    for ids in plan:
        assert len(ids) == 1 or len(ids) * max(lengths[i] for i in ids) <= 20.0 + 1e-6
    assert batches.num_batches(epoch) == len(plan)
    assert sorted(i for ids in plan for i in ids) == sorted(batches.ids)


def test_little_padding_and_no_crumbs():
    batches = make(DURATIONS, batch_duration_s=60.0)
    lengths = dict(zip(batches.ids, DURATIONS, strict=True))
    for epoch in range(3):
        plan = batches.epoch(epoch)
        padded = [len(ids) * max(lengths[i] for i in ids) for ids in plan]
        assert sum(DURATIONS) / sum(padded) > 0.8
        assert min(padded) > 0.5 * max(padded)


def test_longest_batch_is_as_costly_as_any():
    batches = make(DURATIONS)
    lengths = dict(zip(batches.ids, DURATIONS, strict=True))

    def cost(ids):  # attention's
        return len(ids) * max(lengths[i] for i in ids) ** 2

    assert cost(batches.longest()) >= max(cost(ids) for n in range(5) for ids in batches.epoch(n)) * 0.85
    assert max(lengths.values()) == max(lengths[i] for i in batches.longest())


def test_unshuffled_plans_are_the_same_in_every_epoch():
    batches = make(DURATIONS, shuffle=False)
    assert batches.epoch(0) == batches.epoch(7)


def test_a_batch_is_padded_at_the_end():
    batches = make([0.5, 0.3])
    batch = batches.load(["c1", "c0"])
    assert batch.ids == ["c1", "c0"]
    assert batch.features_BTF.shape == (2, 50, 4)
    assert batch.lens_B.tolist() == [30, 50]
    assert torch.all(batch.features_BTF[0, :30] == 1)
    assert torch.all(batch.features_BTF[0, 30:] == 0)
    assert batch.tokens_BU.tolist() == [[3, 4], [3, 0]]
    assert batch.token_lens_B.tolist() == [2, 1]
    assert batch.texts == ["AB", "A"]


def test_labels_that_may_not_be_used_are_not_there():
    batches = make([0.5, 0.3, 0.4], labelled_ids={"c0"})
    assert batches.num_labelled == 1
    batch = batches.load(["c0", "c1", "c2"])
    assert batch.labelled_B.tolist() == [True, False, False]
    assert batch.token_lens_B.tolist() == [1, 0, 0]
    assert batch.texts == ["A", "", ""]
    none = batches.load(["c1"])
    assert none.tokens_BU.shape == (1, 0)


def test_a_cut_without_text_counts_as_unlabelled():
    batches = CutBatches([FakeCut("c0", 0.2, "")], FakeTokens(), batch_duration_s=1, seed=0)
    assert not batches.load(["c0"]).labelled_B.any()


@pytest.mark.parametrize(("cache", "reads"), [(None, 1), (0, 3), (50 * 4 * 4, 1), (50 * 4 * 4 - 1, 3)])
def test_features_are_read_once_if_they_fit_into_the_cache(cache, reads):
    cut = FakeCut("c0", 0.5)
    batches = CutBatches([cut], FakeTokens(), batch_duration_s=1, seed=0, cache=cache)
    loaded = [batches.load(["c0"]).features_BTF for _ in range(3)]
    assert len(cut.reads) == reads
    assert all(torch.equal(x, loaded[0]) for x in loaded)


def test_a_batch_does_not_share_memory_with_the_cache():
    batches = make([0.5])
    batches.load(["c0"]).features_BTF.fill_(99)
    assert not (batches.load(["c0"]).features_BTF == 99).any()


def test_wrong_cuts_are_refused():
    with pytest.raises(DataError, match="no utterances"):
        make([])
    cut = FakeCut("c0", 0.5)
    with pytest.raises(DataError, match="more than once"):
        CutBatches([cut, cut], FakeTokens(), batch_duration_s=1, seed=0)
    cut.has_features = False
    with pytest.raises(DataError, match="no features") as caught:
        CutBatches([cut], FakeTokens(), batch_duration_s=1, seed=0)
    assert caught.value.problems[0].where == "c0"


def test_real_cuts_load_and_damaged_features_are_named(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_speakers=3, utterances_per_speaker=2)
    config = {"name": "fbank", "num_mel_bins": 20, "speed_perturb": [1.0]}
    cuts = compute_features(corpus, tmp_path / "features", config)["train"]
    tokenizer = Tokenizer.train([c.supervisions[0].text for c in cuts], "char", None, tmp_path)
    batches = CutBatches(cuts, tokenizer, batch_duration_s=10, seed=0)
    batch = batches.load(batches.ids)
    assert batch.features_BTF.shape[2] == 20
    assert [
        tokenizer.decode(t[:n]) for t, n in zip(batch.tokens_BU, batch.token_lens_B, strict=True)
    ] == batch.texts
    assert batches.duration_s(batches.ids) == pytest.approx(sum(c.duration for c in cuts))
    next((tmp_path / "features" / "storage" / "train").rglob("*.npy")).write_bytes(b"")
    with pytest.raises(DataError, match="can't read its features"):
        CutBatches(cuts, tokenizer, batch_duration_s=10, seed=0).load(batches.ids)
