"""Losses on whole texts against sums over all alignments, and the texts that a CTC head gives."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import MIN_LOG_PROB, ctc_greedy
from kdrecipe.interfaces import LossSetup, ModelInfo, ModelOutput, NBest, Piece, Targets, TargetSpec
from kdrecipe.targets.kinds import kind_of
from kdrecipe.targets.kinds.hypotheses import n_best
from kdrecipe.targets.rows import in_row
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import (
    VOCAB_SIZE,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)
from kdrecipe_plugins.losses.sequences import CtcBestPath, CtcFullSum, CtcNBest

BATCH = random_batch()
SPEC = TargetSpec("hypotheses", "ctc", dtype="float32", top_k=4)
LOSSES = (CtcBestPath, CtcNBest, CtcFullSum)
quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 10_000)

OPTIONS = {
    "ctc_nbest-one": (CtcNBest, {}),
    "ctc_full_sum-one": (CtcFullSum, {}),
    "ctc_full_sum-normalised": (CtcFullSum, {"num_texts": 4, "normalise": True}),
}
CHECKS = [(n, c) for n, (cls, options) in OPTIONS.items() for c in loss_contract(cls, options).bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


def probability(p, text):
    """P(text) by adding up all paths, p (T, V) posteriors."""
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        merged = [k for k, _ in itertools.groupby(path) if k != 0]
        if merged == list(text):
            total += math.prod(float(p[t, k]) for t, k in enumerate(path))
    return total


def small(seed, num_frames=4, num_classes=3):
    """Posteriors of student and teacher for one utterance with a frame of padding."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 1, num_frames + 1, num_classes, generator=rng)
    lens_B = torch.tensor([num_frames])
    out = ModelOutput(torch.zeros(1, num_frames + 1, 2), lens_B, {"ctc": logits[0]})
    return out, logits[1], logits[:, 0, :num_frames].softmax(-1)


def make(cls, **options):
    return cls(cls.Config(**options), loss_setup())


def text_of(item, number, row=0):
    return tuple(item.tokens_BNU[row, number, : item.token_lens_BN[row, number]].tolist())


# ---------------------------------------------------------------- the texts of a CTC head


@quick
@given(seeds)
def test_the_best_texts_are_the_most_probable_of_all_with_exact_probabilities(seed):
    out, logits, (_, p) = small(seed)
    item = n_best(logits, out.lens_B, 4)
    texts = [text for size in range(5) for text in itertools.product((1, 2), repeat=size)]
    by_probability = sorted(((probability(p, text), text) for text in texts), reverse=True)
    for number, (want, _) in enumerate(by_probability[:4]):
        assert float(item.log_probs_BN[0, number].exp()) == pytest.approx(want, rel=1e-3)
        assert probability(p, text_of(item, number)) == pytest.approx(want, rel=1e-3)


def test_one_text_is_that_of_the_best_path():
    logits_BTV = random_output((9, 6, 7)).logits["ctc"]
    lens_B = torch.tensor([9, 6, 7])
    item = n_best(logits_BTV, lens_B, 1)
    assert [list(text_of(item, 0, row)) for row in range(3)] == ctc_greedy(logits_BTV, lens_B)[0]


def test_texts_that_are_not_there_have_no_probability():
    item = n_best(torch.tensor([[[0.0, 1.0]]]), torch.tensor([1]), 4)  # one frame, one token: two texts
    assert item.token_lens_BN.tolist() == [[1, 0, 0, 0]]
    assert item.log_probs_BN[0, 2:].tolist() == [MIN_LOG_PROB] * 2
    assert item.log_probs_BN[0, :2].exp().sum() == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_cached_texts_are_the_live_ones(top_k):
    spec, kind = replace(SPEC, top_k=top_k), kind_of(SPEC)
    out = random_output((9, 6, 0, 7))
    item = kind.rounded(kind.of_model(out, BATCH, spec), spec)
    cached = kind.collated([kind.parts(item, row, spec) for row in range(4)])
    for name in ("tokens_BNU", "token_lens_BN", "log_probs_BN"):
        torch.testing.assert_close(getattr(cached, name), getattr(item, name), rtol=0, atol=0)
    assert item.lens_B.tolist() == [top_k or 1] * 4


def test_texts_of_joined_utterances_are_refused():
    arrays = {"tokens": np.zeros((1, 2), np.int32)}
    whole = in_row([arrays], [Piece("a", 3, 40)], 50, SPEC, 4)  # silence around it changes nothing
    assert whole is arrays
    with pytest.raises(DataError, match="can't be joined"):
        in_row([arrays] * 2, [Piece("a", 0, 40), Piece("b", 48, 40)], 88, SPEC, 4)


# ---------------------------------------------------------------- losses


@quick
@given(seeds)
def test_ctc_nbest_weighs_texts_by_their_probabilities(seed):
    out, logits, (q, p) = small(seed)
    item = n_best(logits, out.lens_B, 3)
    result = make(CtcNBest, num_texts=3)(out, Targets({SPEC.key: item}), BATCH)
    texts = [text_of(item, number) for number in range(3)]
    shares = [probability(p, text) for text in texts]
    want = sum(
        -s / sum(shares) * math.log(probability(q, t)) for s, t in zip(shares, texts, strict=True) if t
    )
    assert float(result.total) == pytest.approx(want, rel=1e-3)
    count = sum(s / sum(shares) * len(t) for s, t in zip(shares, texts, strict=True))
    assert float(result.count) == pytest.approx(count, rel=1e-3)


def test_ctc_best_path_is_ctc_on_the_teachers_text():
    out = random_output((9, 6, 7))
    targets = targets_like(out, [TargetSpec("frame_logits", "ctc", top_k=1)])
    frames = targets_like(out, [TargetSpec("frame_logits", "ctc")])
    item = n_best(frames.posteriors().log_probs_BTK, out.lens_B, 1)
    got = make(CtcBestPath)(out, targets, BATCH)
    want = make(CtcNBest)(out, Targets({SPEC.key: item}), BATCH)
    assert float(got.total) == pytest.approx(float(want.total), rel=1e-5)
    assert float(got.count) == float(want.count) == int(item.token_lens_BN.sum())


@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("normalise", [False, True])
@quick
@given(seed=seeds)
def test_ctc_full_sum(distance, normalise, seed):
    out, logits, (q, p) = small(seed)
    item = n_best(logits, out.lens_B, 3)
    texts = [text for number in range(3) if (text := text_of(item, number))]
    log_p, log_q = ([math.log(probability(x, text)) for text in texts] for x in (p, q))
    if normalise:
        log_p, log_q = ([x - math.log(sum(map(math.exp, xs))) for x in xs] for xs in (log_p, log_q))
    apart = [abs(a - b) for a, b in zip(log_p, log_q, strict=True)]
    loss = make(CtcFullSum, num_texts=3, distance=distance, normalise=normalise)
    result = loss(out, Targets({SPEC.key: item}), BATCH)
    want = sum(apart) if distance == "l1" else sum(x * x for x in apart)
    assert float(result.total) == pytest.approx(want, rel=2e-3, abs=1e-4)
    assert int(result.count) == sum(map(len, texts))


def test_probabilities_are_scaled_over_the_texts_that_count():
    """The empty text is among the best of a teacher that says blank, and is left out."""
    out, logits, _ = small(0)
    logits[..., 0] += 3
    p, q = logits[0, :4].softmax(-1), out.logits["ctc"][0, :4].softmax(-1)
    item = n_best(logits, out.lens_B, 3)
    texts = [text_of(item, number) for number in range(3)]
    assert () in texts
    spoken = [text for text in texts if text]
    shares = [[probability(x, text) for text in spoken] for x in (p, q)]
    a, b = ([math.log(x / sum(xs)) for x in xs] for xs in shares)
    loss = make(CtcFullSum, num_texts=3, normalise=True, distance="l2")
    result = loss(out, Targets({SPEC.key: item}), BATCH)
    want = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert float(result.total) == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_full_sum_is_0_where_both_agree():
    out = random_output((9, 6, 7))
    targets = targets_like(out, [SPEC], noise=0.0)
    assert float(make(CtcFullSum, num_texts=4)(out, targets, BATCH).total) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("cls", [CtcNBest, CtcFullSum])
def test_wider_caches_are_narrowed(cls):
    out = random_output((9, 6, 7))
    targets = targets_like(out, [SPEC])
    item = targets.hypotheses()
    narrow = NBest(item.tokens_BNU[:, :2], item.token_lens_BN[:, :2], item.log_probs_BN[:, :2])
    loss = make(cls, num_texts=2)
    want = loss(out, Targets({SPEC.key: narrow}), BATCH)
    assert float(loss(out, targets, BATCH).total) == pytest.approx(float(want.total))


@pytest.mark.parametrize("cls", [CtcNBest, CtcFullSum])
def test_texts_too_long_for_the_students_frames_are_counted_and_left_out(cls):
    out = random_output((2, 6))
    tokens_BNU = torch.tensor([[[2, 2]], [[2, 2]]])  # two alike need three frames
    item = NBest(tokens_BNU, torch.tensor([[2], [2]]), torch.tensor([[-1.0], [-1.0]]))
    result = make(cls)(out, Targets({SPEC.key: item}), BATCH)
    assert (int(result.metrics["infeasible"]), float(result.count)) == (1, 2.0)
    only = out.select(torch.tensor([False, True]))
    alone = make(cls)(only, Targets({SPEC.key: item}).map(lambda x: x[1:]), BATCH)
    assert float(result.total) == pytest.approx(float(alone.total), rel=1e-4)


def test_frames_of_another_rate_do_not_matter():
    teacher = random_output((18, 12, 14), seed=1)
    targets = Targets({SPEC.key: n_best(teacher.logits["ctc"], teacher.lens_B, 4)})
    out = random_output((9, 6, 7))
    assert torch.isfinite(make(CtcNBest, num_texts=4)(out, targets, BATCH).total)


@pytest.mark.parametrize("cls", LOSSES)
def test_other_tokens_are_refused(cls):
    other = ModelInfo("other", VOCAB_SIZE, 0.04, {"ctc": ("frame_logits",)}, {})
    with pytest.raises(RecipeError, match="same tokens"):
        cls(cls.Config(), LossSetup(model_info(), other))


def test_one_text_has_nothing_to_be_scaled_to():
    with pytest.raises(ValueError, match="set num_texts above 1"):
        CtcFullSum.Config(normalise=True)
