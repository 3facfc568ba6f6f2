"""Sums over all paths of the transducer's lattice (Graves 2012), with occupancies as their gradient.

A path starts at frame 0 and position 0. A token moves it to the next position, a blank to the next frame.
It ends with a blank at the last frame, after the last token. All is plain PyTorch, on any device.

B utterances, T frames, U tokens, P = U + 1 positions, X = T + 1 points between frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrecipe.frames import frame_mask, full_precision


def lattice_log_likelihood(
    next_BPT: Tensor, blank_BPT: Tensor, lens_B: Tensor, token_lens_B: Tensor
) -> Tensor:
    """(B,) log P(text | audio), float32 at least: the sum over all paths.

    Its gradient is the occupancies. Where no path is possible it is -inf, with gradient 0; an
    utterance without frames has the one empty path if it has no tokens either.

    Args:
        next_BPT: log-posterior of the next token at each position and frame; -inf where there is none.
        blank_BPT: of the blank. The content of their padding does not matter.
        lens_B: int64, valid frames.
        token_lens_B: int64, U of each utterance, at most P - 1.
    """
    return lattice_pass(next_BPT, blank_BPT, lens_B, token_lens_B)[0]


def lattice_pass(
    next_BPT: Tensor, blank_BPT: Tensor, lens_B: Tensor, token_lens_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lattice_log_likelihood`, and the occupancies, which carry no gradient.

    Returns:
        log P (B,); the probability that a path passes the token after each position and frame
        (B, P, T); that it passes the blank there (B, P, T), which sums to 1 over a frame's positions.
    """
    found: tuple[Tensor, Tensor, Tensor] = _LatticePass.apply(  # type: ignore[no-untyped-call]
        full_precision(next_BPT), full_precision(blank_BPT), lens_B, token_lens_B
    )
    return found


class _LatticePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, next_BPT: Tensor, blank_BPT: Tensor, lens_B: Tensor, token_lens_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ll_B, next_occ_BPT, blank_occ_BPT = _forward_backward(next_BPT, blank_BPT, lens_B, token_lens_B)
        dtype = next_BPT.dtype
        next_occ_BPT, blank_occ_BPT = next_occ_BPT.to(dtype), blank_occ_BPT.to(dtype)
        ctx.save_for_backward(next_occ_BPT, blank_occ_BPT)
        ctx.mark_non_differentiable(next_occ_BPT, blank_occ_BPT)
        return ll_B.to(dtype), next_occ_BPT, blank_occ_BPT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        next_occ_BPT, blank_occ_BPT = ctx.saved_tensors
        # an impossible text has no occupancy; its gradient may be anything (0 / 0 upstream)
        grad_B11 = grad_B.nan_to_num()[:, None, None]
        return grad_B11 * next_occ_BPT, grad_B11 * blank_occ_BPT, None, None


def _forward_backward(
    next_BPT: Tensor, blank_BPT: Tensor, lens_B: Tensor, token_lens_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 log P (B,) and both occupancies (B, P, T).

    The padding is changed so that all utterances end at the last column: behind its frames, the
    blank costs nothing and there are no tokens. What is impossible costs more than any path can,
    but not infinity, so that differences of sums along frames stay defined.
    """
    num_positions, num_frames = next_BPT.shape[1:]
    valid_B1T = frame_mask(lens_B, num_frames)[:, None]
    positions_P1 = torch.arange(num_positions, device=lens_B.device)[:, None]
    is_last_BP1 = positions_P1 == token_lens_B[:, None, None]
    has_next_BPT = valid_B1T & (positions_P1 < token_lens_B[:, None, None])
    next_BPT = next_BPT.double().where(has_next_BPT, -torch.inf)
    blank_BPT = blank_BPT.double().where(valid_B1T, 0.0)
    costliest = max_finite(next_BPT).maximum(max_finite(blank_BPT)) * (num_frames + num_positions)
    blocked = -(2 * costliest + 1000)
    next_BPT = blocked.where(next_BPT == -torch.inf, next_BPT)
    blank_BPT = blocked.where(blank_BPT == -torch.inf, blank_BPT)

    # Columns are points between frames, 0 to T; the last one has no tokens. Forward and backward
    # sums are the same recursion, once with everything reversed, and run side by side.
    next_PBX = torch.cat([next_BPT, blocked.expand(*next_BPT.shape[:2], 1)], dim=-1).transpose(0, 1)
    blank_PBT = blank_BPT.transpose(0, 1)
    reversed_PBX = next_PBX.flip(-1).flip(0).roll(-1, 0)  # position P - 2 comes first, P - 1 last
    starts_PB = blocked.where(positions_P1 != 0, 0.0).expand(-1, len(lens_B))
    ends_PB = blocked.where(~is_last_BP1[..., 0].T, 0.0)
    sums_PBX = _path_sums(
        torch.cat([next_PBX, reversed_PBX], dim=1),
        torch.cat([blank_PBT, blank_PBT.flip(-1).flip(0)], dim=1),
        torch.cat([starts_PB, ends_PB.flip(0)], dim=1),
    )
    alpha_BPX, beta_BPX = sums_PBX.transpose(0, 1).chunk(2)
    beta_BPX = beta_BPX.flip(-1).flip(1)

    ll_B = beta_BPX[:, 0, 0]
    possible_B = ll_B > blocked / 2
    after_BPT = torch.cat([beta_BPX[:, 1:, :-1], beta_BPX[:, :1, :-1]], dim=1)  # the last: masked below
    base_BPT = alpha_BPX[..., :-1] - ll_B[:, None, None]
    used_BPT = (valid_B1T & possible_B[:, None, None]).expand_as(next_BPT)
    next_occ_BPT = (base_BPT + next_BPT + after_BPT).exp().where(used_BPT & has_next_BPT, 0.0)
    blank_occ_BPT = (base_BPT + blank_BPT + beta_BPX[..., 1:]).exp().where(used_BPT, 0.0)
    # not a comparison alone: NaN must come through
    return ll_B.masked_fill(ll_B <= blocked / 2, -torch.inf), next_occ_BPT, blank_occ_BPT


def max_finite(values: Tensor) -> Tensor:
    """The largest absolute value (), infinities left out; 0 of none."""
    finite = values.abs().masked_fill(values.isinf(), 0.0).flatten()
    return torch.cat([finite, finite.new_zeros(1)]).max()


def _path_sums(next_PBX: Tensor, blank_PBT: Tensor, starts_PB: Tensor) -> Tensor:
    """(P, B, T + 1) log-sums over all paths from the starts to each point of the lattice.

    Position by position; along a position's frames, all ways in and on by blanks are one cumulative sum.

    Args:
        next_PBX: (P, B, T + 1) from position p to p + 1; the last position's is not used.
        blank_PBT: from column t to t + 1.
        starts_PB: log-weight of starting at each position, in column 0.
    """
    through_PBX = F.pad(blank_PBT.cumsum(-1), (1, 0))
    rows = [through_PBX[0] + starts_PB[0][:, None]]
    for position in range(1, len(next_PBX)):
        entered_BX = rows[-1] + next_PBX[position - 1]
        entered_BX[:, 0] = torch.logaddexp(entered_BX[:, 0], starts_PB[position])
        through_BX = through_PBX[position]
        rows.append((entered_BX - through_BX).logcumsumexp(-1) + through_BX)
    return torch.stack(rows)
