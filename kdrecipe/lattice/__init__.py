"""The transducer's lattice: pruning, joining, posteriors (its paths: :mod:`~kdrecipe.lattice.paths`).

*Pruned* training (Kuang 2022, arXiv 2206.13236, and k2's ``rnnt_loss_smoothed`` and
``rnnt_loss_pruned``): a *simple* joiner, the sum of two sides, needs no tensor over frames, positions and
tokens. Its lattice says which few positions each frame is likely to be at; only there is the true
joiner asked.

Several losses share one forward pass: what they need is kept in ``Lattice.kept``. The graph behind it
is one, so add their totals before the backward pass.

B utterances, T frames, U tokens, P = U + 1 positions, V vocabulary, J joiner's width, R positions kept per
frame, N valid frames of a batch in a row, C rows of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kdrecipe.frames import MIN_LOG_PROB, frame_mask, full_precision
from kdrecipe.interfaces import BLANK_ID, Lattice, LatticePosteriors
from kdrecipe.lattice.paths import lattice_log_likelihood, lattice_pass

LM_SCALE = 0.25
AM_SCALE = 0.0
MIN_RANGE = 2  # with one position per frame no token could be passed


# ---------------------------------------------------------------- simple joiner, ranges


@dataclass
class SimplePass:
    """The simple joiner's lattice.

    Args:
        log_likelihood_B: log P(text | audio).
        next_occupancy_BPT: see :func:`~kdrecipe.lattice.paths.lattice_pass`.
        blank_occupancy_BPT: see there.
    """

    log_likelihood_B: Tensor
    next_occupancy_BPT: Tensor
    blank_occupancy_BPT: Tensor


def simple_pass(lattice: Lattice, lm_scale: float = LM_SCALE, am_scale: float = AM_SCALE) -> SimplePass:
    """The simple joiner's likelihood and occupancies; kept.

    Args:
        lattice: its two sides.
        lm_scale: share of the predictor's own posteriors in the log-posteriors, as in k2.
        am_scale: share of those of the encoder and the utterance's mean predictor. (k2 takes the
            batch's mean; then an utterance's loss would depend on its neighbours.)
    """
    key = ("simple", lm_scale, am_scale)
    if key not in lattice.kept:
        # sums of exponentials need more than half precision
        with torch.autocast(lattice.am_BTV.device.type, enabled=False):
            next_BPT, blank_BPT = _simple_log_probs(lattice, lm_scale, am_scale)
        found = lattice_pass(next_BPT, blank_BPT, lattice.lens_B, lattice.token_lens_B)
        lattice.kept[key] = SimplePass(*found)
    result: SimplePass = lattice.kept[key]
    return result


def _simple_log_probs(lattice: Lattice, lm_scale: float, am_scale: float) -> tuple[Tensor, Tensor]:
    """(B, P, T) log-posteriors of the next token and of the blank by the simple joiner.

    Both sides less their maxima, so that the exponentials' product, which is the normaliser, keeps
    in range.
    """
    am_BTV, lm_BPV = full_precision(lattice.am_BTV), full_precision(lattice.lm_BPV)
    tiny = torch.finfo(am_BTV.dtype).tiny
    am_max_BT1, lm_max_BP1 = (x.detach().amax(-1, keepdim=True) for x in (am_BTV, lm_BPV))
    am_probs_BTV, lm_probs_BPV = (am_BTV - am_max_BT1).exp(), (lm_BPV - lm_max_BP1).exp()
    both_BPT = (lm_probs_BPV @ am_probs_BTV.transpose(1, 2) + tiny).log()
    both_BPT = both_BPT + lm_max_BP1 + am_max_BT1.transpose(1, 2)

    tokens_BP = next_tokens(lattice)
    lm_next_BP1 = lm_BPV.gather(-1, tokens_BP[..., None])
    lm_blank_BP1 = lm_BPV[..., BLANK_ID, None]
    index_BTP = tokens_BP[:, None].expand(-1, am_BTV.shape[1], -1)
    am_next_BPT = am_BTV.gather(-1, index_BTP).transpose(1, 2)
    am_blank_B1T = am_BTV[..., BLANK_ID][:, None]
    share = 1 - lm_scale - am_scale
    next_BPT = share * (am_next_BPT + lm_next_BP1 - both_BPT)
    blank_BPT = share * (am_blank_B1T + lm_blank_BP1 - both_BPT)
    if lm_scale:
        lm_sum_BP1 = lm_probs_BPV.sum(-1, keepdim=True).log() + lm_max_BP1
        next_BPT = next_BPT + lm_scale * (lm_next_BP1 - lm_sum_BP1)
        blank_BPT = blank_BPT + lm_scale * (lm_blank_BP1 - lm_sum_BP1)
    if am_scale:
        positions_BP1 = frame_mask(lattice.token_lens_B + 1, lm_BPV.shape[1])[..., None]
        unigram_BPV = lm_probs_BPV / lm_probs_BPV.sum(-1, keepdim=True) / positions_BP1.sum(1, keepdim=True)
        unigram_BV = unigram_BPV.where(positions_BP1, 0.0).sum(1) + tiny
        am_sum_BT = (am_probs_BTV @ unigram_BV[..., None])[..., 0].log() + am_max_BT1[..., 0]
        log_unigram_BV = unigram_BV.log()
        unigram_next_BP1 = log_unigram_BV.gather(1, tokens_BP)[..., None]
        unigram_blank_B11 = log_unigram_BV[:, BLANK_ID, None, None]
        next_BPT = next_BPT + am_scale * (am_next_BPT + unigram_next_BP1 - am_sum_BT[:, None])
        blank_BPT = blank_BPT + am_scale * (am_blank_B1T + unigram_blank_B11 - am_sum_BT[:, None])
    return next_BPT, blank_BPT


def next_tokens(lattice: Lattice) -> Tensor:
    """(B, P) the token after each position; the blank where there is none."""
    tokens_BP = F.pad(lattice.tokens_BU, (0, 1), value=BLANK_ID)
    return tokens_BP.where(frame_mask(lattice.token_lens_B, tokens_BP.shape[1]), BLANK_ID)


def prune_ranges(
    next_occupancy_BPT: Tensor,
    blank_occupancy_BPT: Tensor,
    lens_B: Tensor,
    token_lens_B: Tensor,
    num_positions: int,
) -> Tensor:
    """(B, T, R) int64: the R neighbouring positions that each frame keeps, as k2's ``get_rnnt_prune_ranges``.

    Of each frame, those with the most occupancy; then moved so that the first position never falls
    from frame to frame, never rises by more than R - 1, is 0 at first and lets the last
    frame reach the end of the text. R is ``num_positions``, or more where a text needs it to be
    spelt in its frames, and at most P.

    Args:
        next_occupancy_BPT: of the simple joiner.
        blank_occupancy_BPT: of the simple joiner.
        lens_B: int64, valid frames.
        token_lens_B: int64.
        num_positions: at least 2.
    """
    all_positions, num_frames = blank_occupancy_BPT.shape[1:]
    device = lens_B.device
    needed_B = -(-token_lens_B // lens_B.clamp(min=1)) + 1
    size = max([num_positions, MIN_RANGE, *needed_B.tolist()])
    size = min(size, all_positions)
    if size == all_positions or not num_frames:
        return torch.arange(size, device=device).expand(len(lens_B), num_frames, size)
    # The mass that stays within a window, less what enters it from below within the same frame.
    inside_BPT = F.pad(blank_occupancy_BPT.cumsum(1), (0, 0, 1, 0))
    inside_BPT = inside_BPT[:, size:] - inside_BPT[:, :-size]
    entering_BPT = F.pad(next_occupancy_BPT, (0, 0, 1, 0))[:, : inside_BPT.shape[1]]
    begin_BT = (inside_BPT - entering_BPT).argmax(1)
    last_B1 = (token_lens_B - size + 1).clamp(min=0)[:, None]
    begin_BT = begin_BT.where(frame_mask(lens_B - 1, num_frames), last_B1)
    begin_BT = _rising(begin_BT)
    # Rising by at most R - 1: then what is left of the steepest line never falls.
    steepest_T = (size - 1) * torch.arange(num_frames, device=device)
    ranges_BTR: Tensor = (steepest_T - _rising(steepest_T - begin_BT).clamp(min=0))[..., None]
    return ranges_BTR + torch.arange(size, device=device)


def _rising(values_BT: Tensor) -> Tensor:
    """The largest values not above these that never fall along T."""
    falling_BT: Tensor = values_BT.flip(1).cummin(1).values
    return falling_BT.flip(1)


# ---------------------------------------------------------------- joined at the kept cells


@dataclass
class Cells:
    """The true joiner's log-posteriors at the kept positions of all valid frames.

    Args:
        log_probs_NR3: of the next token (-inf where there is none), the blank, and all other tokens
            together; float32 at least.
        rows_N: int64, the utterance of each frame.
        frames_N: int64, its number within the utterance.
        positions_NR: int64.
        valid_NR: bool, False behind the last position of a text.
    """

    log_probs_NR3: Tensor
    rows_N: Tensor
    frames_N: Tensor
    positions_NR: Tensor
    valid_NR: Tensor


def joined_cells(
    lattice: Lattice, num_positions: int | None, lm_scale: float = LM_SCALE, am_scale: float = AM_SCALE
) -> Cells:
    """Log-posteriors at ``num_positions`` positions per frame (None: at all of them); kept.

    Args:
        lattice: its two sides.
        num_positions: see :func:`prune_ranges`.
        lm_scale: of the :func:`simple_pass` that chooses them.
        am_scale: of the same pass.
    """
    key = ("cells", num_positions) if num_positions is None else ("cells", num_positions, lm_scale, am_scale)
    if key not in lattice.kept:
        num_frames, all_positions = lattice.encoder_BTJ.shape[1], lattice.predictor_BPJ.shape[1]
        if num_positions is None or num_positions >= all_positions:
            ranges_BTR = torch.arange(all_positions, device=lattice.lens_B.device)
            ranges_BTR = ranges_BTR.expand(len(lattice.lens_B), num_frames, all_positions)
        else:
            simple = simple_pass(lattice, lm_scale, am_scale)
            ranges_BTR = prune_ranges(
                simple.next_occupancy_BPT,
                simple.blank_occupancy_BPT,
                lattice.lens_B,
                lattice.token_lens_B,
                num_positions,
            )
        lattice.kept[key] = join_at(lattice, ranges_BTR, at_once=num_positions is None)
    result: Cells = lattice.kept[key]
    return result


def join_at(lattice: Lattice, ranges_BTR: Tensor, *, at_once: bool = False) -> Cells:
    """Join at the valid frames' ``ranges_BTR``.

    In blocks of frames that are joined again in the backward pass: that costs a quarter of the time,
    and neither the logits nor the joiner's hidden values are ever kept for all frames.

    Args:
        lattice: its two sides.
        ranges_BTR: int64, of :func:`prune_ranges`.
        at_once: one block, nothing joined again: (N, R, V) logits and (N, R, J) hidden values.
    """
    rows_N, frames_N = frame_mask(lattice.lens_B, ranges_BTR.shape[1]).nonzero(as_tuple=True)
    positions_NR = ranges_BTR[rows_N, frames_N]
    token_lens_N1 = lattice.token_lens_B[rows_N, None]
    at_NR = rows_N[:, None] * lattice.predictor_BPJ.shape[1] + positions_NR
    encoder_NJ = lattice.encoder_BTJ.flatten(0, 1)
    if len(rows_N) < len(encoder_NJ):  # index_select: its gradient is the only quick one of its kind on CPUs
        encoder_NJ = encoder_NJ.index_select(0, rows_N * ranges_BTR.shape[1] + frames_N)
    arguments = encoder_NJ, at_NR, next_tokens(lattice).flatten()[at_NR], positions_NR < token_lens_N1
    size = max(1, len(rows_N))
    if not at_once:
        width = at_NR.shape[1] * max(lattice.encoder_BTJ.shape[-1], lattice.am_BTV.shape[-1])
        size = max(1, (2**18 if rows_N.device.type == "cpu" else 2**26) // width)
    blocks = zip(*(torch.split(x, size) for x in arguments), strict=True)
    predictor_XJ = lattice.predictor_BPJ.flatten(0, 1)
    join = _join_block if at_once else _join_again
    parts = [join(lattice.join, predictor_XJ, *block) for block in blocks]
    return Cells(torch.cat(parts), rows_N, frames_N, positions_NR, positions_NR <= token_lens_N1)


def _join_block(
    join: Callable[[Tensor, Tensor], Tensor],
    predictor_XJ: Tensor,
    encoder_NJ: Tensor,
    at_NR: Tensor,
    next_NR: Tensor,
    has_next_NR: Tensor,
) -> Tensor:
    """(N, R, 3) of some frames; ``at_NR`` are rows of ``predictor_XJ``."""
    predictor_NRJ = predictor_XJ.index_select(0, at_NR.flatten()).view(*at_NR.shape, predictor_XJ.shape[1])
    with torch.autocast(encoder_NJ.device.type, enabled=False):  # a lattice may choose a lower precision
        logits_NRV = join(full_precision(encoder_NJ)[:, None], full_precision(predictor_NRJ))
    return three_way(logits_NRV, next_NR, has_next_NR)


def _join_again(*block: Any) -> Tensor:
    """:func:`_join_block`, run again in the backward pass: nothing is kept but its arguments."""
    if not torch.is_grad_enabled():
        return _join_block(*block)
    # a joiner draws no random numbers, so their state need not be set back
    joined: Tensor = checkpoint(_join_block, *block, use_reentrant=False, preserve_rng_state=False)
    return joined


def cells_log_likelihood(lattice: Lattice, cells: Cells) -> Tensor:
    """(B,) log P(text | audio) over the paths within the kept cells: at most that over all paths."""
    num_positions, num_frames = lattice.predictor_BPJ.shape[1], lattice.encoder_BTJ.shape[1]
    in_row_NR = cells.positions_NR * num_frames + cells.frames_N[:, None]
    at_NR = cells.rows_N[:, None] * (num_positions * num_frames) + in_row_NR
    size = len(lattice.lens_B) * num_positions * num_frames
    next_BPT, blank_BPT = (
        cells.log_probs_NR3.new_full((size,), -torch.inf)
        .scatter(0, at_NR.flatten(), cells.log_probs_NR3[..., kind].flatten())
        .view(-1, num_positions, num_frames)
        for kind in (0, 1)
    )
    return lattice_log_likelihood(next_BPT, blank_BPT, lattice.lens_B, lattice.token_lens_B)


def three_way(logits: Tensor, next_tokens: Tensor, has_next: Tensor) -> Tensor:
    """(..., 3) log-posteriors of the next token, the blank, and all other tokens together.

    float32 at least.

    Args:
        logits: (..., V).
        next_tokens: (...) int64, not the blank; it is not read where there is none.
        has_next: (...) bool; where False, the next token's is -inf and all tokens are others.
    """
    found: Tensor = _ThreeWay.apply(  # type: ignore[no-untyped-call]
        logits, next_tokens.where(has_next, BLANK_ID)[..., None], has_next[..., None]
    )
    return found


class _ThreeWay(torch.autograd.Function):
    """It keeps no other tensor of the size of the logits, and computes their gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, next_1: Tensor, has_next_1: Tensor) -> Tensor:
        x = full_precision(logits)
        next_1x = x.gather(-1, next_1).masked_fill(~has_next_1, -torch.inf)
        two = torch.cat([next_1x, x[..., BLANK_ID, None]], dim=-1)
        highest = x.amax(-1, keepdim=True)
        others = (x - highest).exp_()
        others[..., BLANK_ID] = 0
        others.scatter_(-1, next_1, 0.0)
        rest = others.sum(-1, keepdim=True).clamp(min=_LEAST)
        log_norm = highest + (rest + (two - highest).exp().sum(-1, keepdim=True)).log()
        log_probs = torch.cat([two, highest + rest.log()], dim=-1) - log_norm
        ctx.save_for_backward(logits, next_1, has_next_1, log_probs, log_norm)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_3: Tensor) -> tuple[Tensor, None, None]:
        logits, next_1, has_next_1, log_probs, log_norm = ctx.saved_tensors
        grad_3 = torch.cat([grad_3[..., :1].where(has_next_1, 0.0), grad_3[..., 1:]], dim=-1)
        # d log P(k) / d logit(v) = [v in k] * P(v) / P(k) - P(v)
        total = grad_3.sum(-1, keepdim=True)
        two = grad_3[..., :2] - log_probs[..., :2].exp() * total
        others = grad_3[..., 2:] * (-log_probs[..., 2:]).exp() - total
        grad = (full_precision(logits) - log_norm).exp_().mul_(others)
        # in this order: where there is no next token, the blank stands for it
        grad.scatter_(-1, next_1, two[..., :1])
        grad[..., BLANK_ID] = two[..., 1]
        return grad.to(logits.dtype), None, None


_LEAST = 1e-30  # of the largest posterior: what all other tokens have together is at least that


# ---------------------------------------------------------------- a teacher's posteriors


@torch.no_grad()
def full_lattice_posteriors(lattice: Lattice, chunk: int | None = None) -> LatticePosteriors:
    """A teacher's posteriors at every frame and position, joined ``chunk`` frames at a time.

    Args:
        lattice: of the teacher, along the tokens that the student will be forced along.
        chunk: frames; None: as many as keep the logits of the chunk near 16 MB.
    """
    num_rows, num_frames, _ = lattice.encoder_BTJ.shape
    next_BP = next_tokens(lattice)
    has_next_BP = frame_mask(lattice.token_lens_B, next_BP.shape[1])
    if chunk is None:
        chunk = max(1, 2**22 // max(1, next_BP.numel() * lattice.am_BTV.shape[-1]))
    parts = [lattice.am_BTV.new_zeros(num_rows, 0, next_BP.shape[1], 2, dtype=torch.float32)]
    for start in range(0, num_frames, chunk):
        encoder_BT1J = lattice.encoder_BTJ[:, start : start + chunk, None]
        logits_BTPV = lattice.join(encoder_BT1J, lattice.predictor_BPJ[:, None])
        shape = logits_BTPV.shape[:-1]
        three = three_way(logits_BTPV, next_BP[:, None].expand(shape), has_next_BP[:, None].expand(shape))
        parts.append(three[..., :2].float())
    # finite everywhere: what has no meaning must not disturb what stores or averages it
    log_probs_BTP2 = torch.cat(parts, dim=1).clamp(min=MIN_LOG_PROB)
    return LatticePosteriors(log_probs_BTP2, lattice.lens_B, lattice.token_lens_B)


def three_classes(log_probs_2: Tensor) -> Tensor:
    """(..., 3): a teacher's two log-posteriors, and that of what they leave.

    What they leave is known no better than their own precision: 1e-7 in float32.
    """
    largest, other = log_probs_2.amax(-1), log_probs_2.amin(-1)
    rest = (-torch.expm1(largest) - other.exp()).clamp(min=_LEAST).log()
    return torch.cat([log_probs_2, rest[..., None]], dim=-1)
