"""The CTC head, its loss and greedy search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrecipe.frames import ctc_greedy, frames_needed
from kdrecipe.interfaces import Batch, LossOutput, ModelOutput, Targets
from kdrecipe.model.heads import ctc
from kdrecipe.model.heads.ctc import CtcHead, CtcLoss


def collapse(path: tuple[int, ...] | list[int]) -> list[int]:
    """CTC's map from frame labels to tokens."""
    return [label for label, _ in itertools.groupby(path) if label != 0]


def batch_of(tokens: list[list[int]], labelled: list[bool] | None = None) -> Batch:
    size, longest = len(tokens), max([1, *map(len, tokens)])
    padded = torch.zeros(size, longest, dtype=torch.int64)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return Batch(
        ids=[str(i) for i in range(size)],
        features_BTF=torch.zeros(size, 4, 2),
        lens_B=torch.full((size,), 4),
        tokens_BU=padded,
        token_lens_B=torch.tensor([len(t) for t in tokens]),
        labelled_B=torch.tensor(labelled or [True] * size),
    )


def output_of(logits_BTV: Tensor, lens: list[int]) -> ModelOutput:
    return ModelOutput(torch.zeros(*logits_BTV.shape[:2], 1), torch.tensor(lens), {"ctc": logits_BTV})


def run(logits_BTV: Tensor, lens: list[int], batch: Batch) -> LossOutput:
    return CtcLoss(CtcLoss.Config())(output_of(logits_BTV, lens), Targets(), batch)


@given(
    num_frames=st.integers(1, 4),
    tokens=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_loss_is_the_sum_over_all_alignments(num_frames: int, tokens: list[int], seed: int) -> None:
    logits = torch.randn(
        1, num_frames + 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    log_probs = logits[0].log_softmax(-1)
    likelihood = sum(
        math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
        for path in itertools.product(range(3), repeat=num_frames)
        if collapse(path) == tokens
    )
    result = run(logits, [num_frames], batch_of([tokens]))
    assert int(result.count) == len(tokens)
    possible = likelihood > 0
    assert int(result.metrics["infeasible"]) == int(not possible)
    expected = -math.log(likelihood) if possible else 0.0
    assert float(result.total) == pytest.approx(expected, abs=1e-6)


def test_total_and_count_are_sums_over_labelled_utterances() -> None:
    torch.manual_seed(0)
    logits, lens, tokens = torch.randn(3, 8, 5), [8, 6, 7], [[1, 2, 3], [4], [2, 2]]
    parts = [run(logits[i : i + 1], [lens[i]], batch_of([tokens[i]])) for i in range(3)]
    whole = run(logits, lens, batch_of(tokens))
    torch.testing.assert_close(whole.total, torch.stack([p.total for p in parts]).sum())
    assert int(whole.count) == 6
    some = run(logits, lens, batch_of(tokens, [True, False, True]))
    torch.testing.assert_close(some.total, parts[0].total + parts[2].total)
    assert int(some.count) == 5


def test_unlabelled_empty_and_infeasible_utterances_give_neither_loss_nor_gradient() -> None:
    logits = torch.randn(3, 2, 5, requires_grad=True)
    result = run(logits, [2, 2, 2], batch_of([[1], [], [3, 3]], [False, True, True]))
    assert result.total.item() == 0.0
    assert int(result.metrics["infeasible"]) == 1
    result.total.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_batch_with_no_labels_counts_nothing() -> None:
    result = run(torch.randn(2, 4, 5), [4, 4], batch_of([[], []], [False, False]))
    assert float(result.total) == 0.0
    assert int(result.count) == 0


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 5)
    padded = torch.cat([logits, torch.full((1, 3, 5), 50.0)], 1)
    batch = batch_of([[1, 3]])
    wider = batch_of([[1, 3], [1, 1, 1, 1]]).select(torch.tensor([True, False]))
    wider.tokens_BU[:, 2:] = 4
    torch.testing.assert_close(run(padded, [6], wider).total, run(logits, [6], batch).total)


def test_gradient_is_right() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    batch = batch_of([[1, 1], [3]])
    assert torch.autograd.gradcheck(lambda x: run(x, [5, 4], batch).total, (logits,))


def test_half_precision_logits_are_raised_first() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 30, 6).bfloat16()
    batch = batch_of([[1, 2, 3, 4]])
    rough, exact = run(logits, [30], batch).total, run(logits.float(), [30], batch).total
    assert rough.dtype == torch.float32
    assert torch.equal(rough, exact)


def test_frames_needed_counts_blanks_between_doubles_within_the_text_only() -> None:
    batch = batch_of([[1, 1, 2, 2], [1, 2], [], [5]])
    assert frames_needed(batch.tokens_BU, batch.token_lens_B).tolist() == [6, 2, 0, 1]


@pytest.mark.parametrize("size", [0, 2])
def test_texts_without_tokens_need_no_frames(size: int) -> None:
    tokens_BU = torch.zeros(size, 0, dtype=torch.int64)
    lens_B = torch.zeros(size, dtype=torch.int64)
    assert frames_needed(tokens_BU, lens_B).tolist() == [0] * size


def test_a_batch_of_empty_texts_has_no_loss() -> None:
    batch = batch_of([[], []])
    batch.tokens_BU = batch.tokens_BU[:, :0]
    logits = torch.randn(2, 4, 5, requires_grad=True)
    result = run(logits, [4, 4], batch)
    result.total.backward()
    assert result.total.item() == 0.0
    assert int(result.count) == int(result.metrics["infeasible"]) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None)
def test_greedy_collapses_the_best_path(paths: list[list[int]], data: st.DataObject) -> None:
    lens = [data.draw(st.integers(0, 6)) for _ in paths]
    logits = torch.nn.functional.one_hot(torch.tensor(paths), 4).float()
    tokens, frames = ctc_greedy(logits, torch.tensor(lens))
    for path, n, ids, at in zip(paths, lens, tokens, frames, strict=True):
        assert ids == collapse(path[:n])
        assert [path[t] for t in at] == ids
        assert all(t == 0 or path[t - 1] != path[t] for t in at)


def test_head_is_a_linear_map_with_dropout_in_training_only() -> None:
    head = CtcHead(CtcHead.Config(dropout=0.5), 8, 5)
    hidden, lens = torch.randn(2, 3, 8), torch.tensor([3, 2])
    assert head(hidden, lens).shape == (2, 3, 5)
    assert head.vocab_size == 5
    assert not torch.equal(head(hidden, lens), head.eval()(hidden, lens))
    assert torch.equal(head(hidden, lens), head.proj(hidden))


def test_hooks_offer_head_and_loss() -> None:
    offered: list[tuple[str, type]] = []
    ctc.register_heads(lambda name, cls: offered.append((name, cls)))
    ctc.register_losses(lambda name, cls: offered.append((name, cls)))
    assert offered == [("ctc", CtcHead), ("ctc", CtcLoss)]
    assert CtcLoss.supervised
    assert CtcLoss.requires(CtcLoss.Config()) == []
