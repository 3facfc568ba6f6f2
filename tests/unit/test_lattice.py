"""The transducer's lattice against sums over all of its paths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdrecipe.interfaces import Lattice
from kdrecipe.lattice import (
    _simple_log_probs,
    cells_log_likelihood,
    full_lattice_posteriors,
    join_at,
    joined_cells,
    prune_ranges,
    simple_pass,
    three_classes,
    three_way,
)
from kdrecipe.lattice.paths import lattice_log_likelihood, lattice_pass

B, T, U, V, J = 4, 7, 3, 6, 5


def make_lattice(lens=(7, 5, 6, 2), token_lens=(3, 1, 0, 3), *, seed=0, dtype=torch.float64, grad=False):
    rng = torch.Generator().manual_seed(seed)
    num_rows, num_frames, num_positions = len(lens), max([*lens, 1]), max(token_lens) + 1

    def noise(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(grad)

    tokens_BU = torch.randint(3, V, (num_rows, num_positions - 1), generator=rng)
    token_lens_B = torch.tensor(token_lens)
    tokens_BU = tokens_BU.where(torch.arange(num_positions - 1) < token_lens_B[:, None], 0)
    weight_JV = 2 * torch.randn(J, V, generator=rng, dtype=torch.float64).to(dtype)
    return Lattice(
        noise(num_rows, num_frames, V),
        noise(num_rows, num_positions, V),
        noise(num_rows, num_frames, J),
        noise(num_rows, num_positions, J),
        tokens_BU,
        torch.tensor(lens),
        token_lens_B,
        lambda encoder, predictor: torch.tanh(encoder + predictor) @ weight_JV,
    )


def grids(seed=0, lens=(7, 5, 6, 2), token_lens=(3, 1, 0, 3), dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shape = (len(lens), max(token_lens) + 1, max(lens))
    pair = [-3 * torch.rand(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2)]
    return pair[0], pair[1], torch.tensor(lens), torch.tensor(token_lens)


def all_paths(num_frames, num_tokens):
    """Every path as its moves: True is a token; the last move is always a blank."""
    for at in itertools.combinations(range(num_frames - 1 + num_tokens), num_tokens):
        yield [i in at for i in range(num_frames - 1 + num_tokens)] + [False]


def brute_force(next_PT, blank_PT, num_frames, num_tokens):
    """log P and both occupancies by listing all paths."""
    scores, visits = [], []
    for moves in all_paths(num_frames, num_tokens):
        frame = position = 0
        score, seen = 0.0, []
        for is_token in moves:
            score = score + (next_PT if is_token else blank_PT)[position, frame]
            seen.append((is_token, position, frame))
            position, frame = (position + 1, frame) if is_token else (position, frame + 1)
        assert (position, frame) == (num_tokens, num_frames)
        scores.append(score)
        visits.append(seen)
    scores = torch.stack(scores)
    occupancy = torch.zeros(2, *blank_PT.shape, dtype=blank_PT.dtype)
    for share, seen in zip(scores.softmax(0), visits, strict=True):
        for is_token, position, frame in seen:
            occupancy[0 if is_token else 1, position, frame] += share
    return scores.logsumexp(0), occupancy[0], occupancy[1]


# ---------------------------------------------------------------- likelihood


def test_likelihood_and_occupancies_are_those_of_all_paths():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids()
    ll_B, next_occ_BPT, blank_occ_BPT = lattice_pass(next_BPT, blank_BPT, lens_B, token_lens_B)
    for i in range(B):
        ll, next_occ, blank_occ = brute_force(next_BPT[i], blank_BPT[i], int(lens_B[i]), int(token_lens_B[i]))
        torch.testing.assert_close(ll_B[i], ll)
        torch.testing.assert_close(next_occ_BPT[i], next_occ)
        torch.testing.assert_close(blank_occ_BPT[i], blank_occ)


def test_gradient_is_the_occupancy():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(lens=(4, 3), token_lens=(2, 1))
    leaves = next_BPT.requires_grad_(), blank_BPT.requires_grad_()
    assert gradcheck(lambda a, b: lattice_log_likelihood(a, b, lens_B, token_lens_B), leaves)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 4))
def test_blanks_leave_every_frame_and_tokens_every_position_once(seed, num_frames, num_tokens):
    _, next_occ_BPT, blank_occ_BPT = lattice_pass(*grids(seed, (num_frames,), (num_tokens,)))
    torch.testing.assert_close(blank_occ_BPT.sum(1), torch.ones(1, num_frames, dtype=torch.float64))
    torch.testing.assert_close(next_occ_BPT[:, :-1].sum(2), torch.ones(1, num_tokens, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-20, 20))
def test_padding_and_order_do_not_matter(seed, filling):
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(seed)
    want_B = lattice_log_likelihood(next_BPT, blank_BPT, lens_B, token_lens_B)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    padded = [torch.nn.functional.pad(x, (0, 3, 0, 2), value=filling)[order] for x in (next_BPT, blank_BPT)]
    for x in padded:
        frames, positions = torch.arange(x.shape[2]), torch.arange(x.shape[1])[:, None]
        valid = (frames < lens_B[order, None, None]) & (positions <= token_lens_B[order, None, None])
        x[~valid] = filling
    got_B = lattice_log_likelihood(*padded, lens_B[order], token_lens_B[order])
    torch.testing.assert_close(got_B, want_B[order])


def test_what_is_impossible_has_no_gradient_and_no_nan():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(lens=(5, 5, 5), token_lens=(2, 2, 2))
    blank_BPT[0, 1, 2] = -torch.inf  # a hole, with ways round it
    blank_BPT[1, :, 3] = -torch.inf  # a wall
    next_BPT[2, :, :3] = -torch.inf
    want, _, _ = brute_force(next_BPT[0], blank_BPT[0], 5, 2)
    leaves = next_BPT.requires_grad_(), blank_BPT.requires_grad_()
    ll_B = lattice_log_likelihood(*leaves, lens_B, token_lens_B)
    ll_B[[0, 2]].sum().backward(retain_graph=True)
    torch.testing.assert_close(ll_B[0], want)
    assert ll_B[1] == -torch.inf
    assert all(x.grad.isfinite().all() for x in leaves)
    assert leaves[1].grad[0, 1, 2] == 0
    ll_B.sum().backward()
    assert leaves[0].grad[1].abs().sum() == 0


def test_long_utterances_stay_exact_in_float32():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(lens=(900,), token_lens=(80,), dtype=torch.float32)
    far_BPT = next_BPT - 30
    ll_B, next_occ_BPT, blank_occ_BPT = lattice_pass(far_BPT, blank_BPT, lens_B, token_lens_B)
    shifted = lattice_pass(next_BPT, blank_BPT, lens_B, token_lens_B)
    torch.testing.assert_close(ll_B, shifted[0] - 80 * 30)
    torch.testing.assert_close(next_occ_BPT, shifted[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(blank_occ_BPT.sum(1), torch.ones(1, 900), atol=1e-4, rtol=1e-4)


def test_empty_texts_and_audio():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(lens=(4, 0, 0), token_lens=(0, 0, 2))
    ll_B = lattice_log_likelihood(next_BPT, blank_BPT, lens_B, token_lens_B)
    torch.testing.assert_close(ll_B[0], blank_BPT[0, 0].sum())
    assert ll_B[1:].tolist() == [0.0, -torch.inf]


def test_nan_comes_through():
    next_BPT, blank_BPT, lens_B, token_lens_B = grids()
    blank_BPT[0, 0, 0] = torch.nan
    assert lattice_log_likelihood(next_BPT, blank_BPT, lens_B, token_lens_B)[0].isnan()


# ---------------------------------------------------------------- simple joiner, ranges


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.0), (0.2, 0.3)])
def test_simple_joiner_is_a_sum_of_posteriors(scales):
    lattice = make_lattice()
    next_BPT, blank_BPT = _simple_log_probs(lattice, *scales)
    both = (lattice.am_BTV[:, None] + lattice.lm_BPV[:, :, None]).log_softmax(-1)
    lm = lattice.lm_BPV.log_softmax(-1)[:, :, None]
    shares = (1 - sum(scales)) * both + scales[0] * lm
    for i in range(B):
        num_tokens = int(lattice.token_lens_B[i])
        unigram_V = lattice.lm_BPV[i, : num_tokens + 1].softmax(-1).mean(0).log()
        am_TV = (lattice.am_BTV[i] + unigram_V).log_softmax(-1)
        for u in range(num_tokens + 1):
            want_TV = shares[i, u] + scales[1] * am_TV
            torch.testing.assert_close(blank_BPT[i, u], want_TV[:, 0])
            if u < num_tokens:
                torch.testing.assert_close(next_BPT[i, u], want_TV[:, lattice.tokens_BU[i, u]])


def test_simple_joiner_takes_large_logits():
    lattice = make_lattice(dtype=torch.float32)
    lattice.am_BTV = 100 * lattice.am_BTV
    assert all(x.isfinite().all() for x in _simple_log_probs(lattice, 0.25, 0.0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranges_hold_a_path(data):
    num_rows = data.draw(st.integers(1, 3))
    lens = data.draw(st.lists(st.integers(1, 8), min_size=num_rows, max_size=num_rows))
    token_lens = data.draw(st.lists(st.integers(0, 9), min_size=num_rows, max_size=num_rows))
    wanted = data.draw(st.integers(2, 6))
    next_BPT, blank_BPT, lens_B, token_lens_B = grids(data.draw(st.integers(0, 10**6)), lens, token_lens)
    _, *occupancies = lattice_pass(4 * next_BPT, 4 * blank_BPT, lens_B, token_lens_B)
    ranges_BTR = prune_ranges(*occupancies, lens_B, token_lens_B, wanted)
    all_positions, size = max(token_lens) + 1, ranges_BTR.shape[2]
    assert size == all_positions or wanted <= size <= all_positions
    begin_BT = ranges_BTR[..., 0]
    assert (begin_BT[:, 0] == 0).all()
    assert ((begin_BT.diff(dim=1) >= 0) & (begin_BT.diff(dim=1) < size)).all()
    assert (ranges_BTR < all_positions).all()
    torch.testing.assert_close(ranges_BTR, begin_BT[..., None] + torch.arange(size))
    for i, (num_frames, num_tokens) in enumerate(zip(lens, token_lens, strict=True)):
        assert num_tokens in ranges_BTR[i, num_frames - 1]
    kept_BPT = torch.zeros_like(next_BPT, dtype=torch.bool)
    kept_BPT.transpose(1, 2).scatter_(2, ranges_BTR, True)
    pruned = (x.masked_fill(~kept_BPT, -torch.inf) for x in (next_BPT, blank_BPT))
    assert lattice_log_likelihood(*pruned, lens_B, token_lens_B).isfinite().all()


def test_ranges_follow_the_occupancy():
    """A text spoken one token per frame: the range moves with it."""
    num_tokens = 12
    next_PT = torch.full((num_tokens + 1, num_tokens), -9.0)
    next_PT.fill_diagonal_(-0.01)
    blank_PT = torch.full_like(next_PT, -1.0)
    lens_B = token_lens_B = torch.tensor([num_tokens])
    _, *occupancies = lattice_pass(next_PT[None], blank_PT[None], lens_B, token_lens_B)
    ranges_TR = prune_ranges(*occupancies, lens_B, token_lens_B, 3)[0]
    frames = torch.arange(num_tokens)
    assert (ranges_TR == frames[:, None]).any(1).all()
    assert (ranges_TR == frames[:, None] + 1).any(1).all()


# ---------------------------------------------------------------- joined cells


def test_three_way_is_a_softmax_in_three_parts():
    logits = torch.randn(5, 2, V, dtype=torch.float64, requires_grad=True)
    tokens, has_next = torch.randint(1, V, (5, 2)), torch.tensor([[True, False]]).expand(5, 2)
    got = three_way(logits, tokens, has_next)
    probs = logits.softmax(-1)
    next_ = probs.gather(-1, tokens[..., None])[..., 0].where(has_next, 0.0)
    blank = probs[..., 0]
    torch.testing.assert_close(got.exp(), torch.stack([next_, blank, 1 - next_ - blank], dim=-1))
    assert gradcheck(lambda x: three_way(x, tokens, has_next)[:, 0], logits)
    assert gradcheck(lambda x: three_way(x, tokens, has_next)[:, 1, 1:], logits)


def test_three_way_is_finite_at_certainty():
    logits = torch.tensor([[200.0, 0, 0, 0], [0, 200.0, 0, 0], [0, 0, 0, 200.0]], requires_grad=True)
    got = three_way(logits, torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    got.sum().backward()
    assert got.isfinite().all()
    assert logits.grad.isfinite().all()


def test_pruned_likelihood_rises_to_that_of_all_paths():
    lattice = make_lattice((6, 6, 5, 3), (4, 3, 0, 4), seed=3)
    want_B = cells_log_likelihood(lattice, joined_cells(lattice, None))
    full = lattice.join(lattice.encoder_BTJ[:, :, None], lattice.predictor_BPJ[:, None]).log_softmax(-1)
    for i in (0, 3):
        num_tokens = int(lattice.token_lens_B[i])
        index = lattice.tokens_BU[i, :num_tokens].expand(full.shape[1], -1)
        next_PT = full[i, :, :num_tokens].gather(-1, index[..., None])[..., 0].T
        ll, _, _ = brute_force(next_PT, full[i, ..., 0].T, int(lattice.lens_B[i]), num_tokens)
        torch.testing.assert_close(want_B[i], ll)
    before_B = torch.full_like(want_B, -torch.inf)
    for num_positions in range(2, 6):
        got_B = cells_log_likelihood(lattice, joined_cells(lattice, num_positions))
        assert (got_B <= want_B + 1e-9).all()
        assert got_B.isfinite().all()
        before_B = got_B
    torch.testing.assert_close(before_B, want_B)


def test_gradients_of_the_pruned_loss():
    lattice = make_lattice((4, 3), (3, 1), grad=True)
    ranges_BTR = prune_ranges(
        simple_pass(lattice).next_occupancy_BPT,
        simple_pass(lattice).blank_occupancy_BPT,
        lattice.lens_B,
        lattice.token_lens_B,
        2,
    )

    def value(am, lm, encoder, predictor):
        sides = Lattice(
            am, lm, encoder, predictor, lattice.tokens_BU, lattice.lens_B, lattice.token_lens_B, lattice.join
        )
        pruned = cells_log_likelihood(sides, join_at(sides, ranges_BTR))
        return pruned + simple_pass(sides, 0.2, 0.1).log_likelihood_B

    assert gradcheck(value, (lattice.am_BTV, lattice.lm_BPV, lattice.encoder_BTJ, lattice.predictor_BPJ))


def test_blocks_are_the_whole():
    """Joined block by block and again in the backward pass, or all at once: the same."""
    lattices = [make_lattice(grad=True) for _ in range(2)]
    for lattice, at_once in zip(lattices, (False, True), strict=True):
        ranges_BTR = torch.arange(2).expand(B, T, 2)
        join_at(lattice, ranges_BTR, at_once=at_once).log_probs_NR3[..., 1:].sum().backward()
    for name in ("encoder_BTJ", "predictor_BPJ"):
        torch.testing.assert_close(*(getattr(lattice, name).grad for lattice in lattices))


def test_blocks_joined_again_reach_the_joiners_parameters():
    """As all at once, and the graph can be walked twice."""
    linear = torch.nn.Linear(J, V, dtype=torch.float64)
    grads = []
    for at_once in (False, True):
        lattice = replace(make_lattice(grad=True), join=lambda x, y: linear(torch.tanh(x + y)))
        cells = join_at(lattice, torch.arange(2).expand(B, T, 2), at_once=at_once)
        total = cells.log_probs_NR3[..., 1:].square().sum()
        total.backward(retain_graph=True)
        total.backward()
        grads.append((lattice.encoder_BTJ.grad, linear.weight.grad))
        linear.weight.grad = None
    for again, whole in zip(*grads, strict=True):
        torch.testing.assert_close(again, whole)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return result


def test_no_tensor_grows_with_frames_times_positions_times_tokens():
    rng = torch.Generator().manual_seed(0)
    num_rows, num_frames, num_tokens, vocab, width, kept = 2, 300, 60, 400, 64, 5

    def noise(*shape):
        return torch.randn(shape, generator=rng).requires_grad_()

    output = torch.nn.Linear(width, vocab)
    lattice = Lattice(
        noise(num_rows, num_frames, vocab),
        noise(num_rows, num_tokens + 1, vocab),
        noise(num_rows, num_frames, width),
        noise(num_rows, num_tokens + 1, width),
        torch.randint(1, vocab, (num_rows, num_tokens), generator=rng),
        torch.full((num_rows,), num_frames),
        torch.full((num_rows,), num_tokens),
        lambda encoder, predictor: output(torch.tanh(encoder + predictor)),
    )
    with LargestTensor() as largest:
        total = cells_log_likelihood(lattice, joined_cells(lattice, kept)).sum()
        (total + simple_pass(lattice).log_likelihood_B.sum()).backward()
    pruned_logits = num_rows * num_frames * kept * vocab
    assert largest.size < pruned_logits  # blocks of it only
    # sides of the joiner; the lattice in both directions; a block
    sides = num_rows * max(num_frames * vocab, 2 * (num_frames + 1) * (num_tokens + 1))
    assert largest.size <= max(sides, 2**18)


# ---------------------------------------------------------------- teachers


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_full_posteriors_are_those_of_the_joined_logits(chunk):
    lattice = make_lattice()
    got = full_lattice_posteriors(lattice, chunk)
    want = lattice.join(lattice.encoder_BTJ[:, :, None], lattice.predictor_BPJ[:, None]).log_softmax(-1)
    assert got.log_probs_BTP2.dtype == torch.float32
    assert got.log_probs_BTP2.isfinite().all()
    for i in range(B):
        for u in range(int(lattice.token_lens_B[i]) + 1):
            torch.testing.assert_close(got.log_probs_BTP2[i, :, u, 1], want[i, :, u, 0].float())
            if u < lattice.token_lens_B[i]:
                token = lattice.tokens_BU[i, u]
                torch.testing.assert_close(got.log_probs_BTP2[i, :, u, 0], want[i, :, u, token].float())


def test_three_classes_are_precise_near_certainty():
    rest = torch.tensor([1e-3, 1e-6, 1e-9], dtype=torch.float64)
    log_probs = torch.stack([torch.log1p(-rest - 1e-12), torch.full_like(rest, 1e-12).log()], dim=-1)
    torch.testing.assert_close(three_classes(log_probs)[:, 2].exp(), rest, rtol=1e-4, atol=0)
    assert three_classes(torch.tensor([[0.0, -torch.inf]])).isfinite()[0, 2]
