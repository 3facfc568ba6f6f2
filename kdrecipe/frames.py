"""Tools for what goes by frames: valid frames, precision, top-k posteriors, CTC's best path and likelihood.

Shapes, in names: B utterances, T frames (padded), N valid frames of a batch in a row, V vocabulary,
K kept classes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.interfaces import BLANK_ID, Posteriors

MIN_LOG_PROB = -1e4
"""Stands for log 0 in a teacher's posteriors.

Its exponential is 0 all the same, but 0 times a difference with it is 0, and with -inf it is NaN.
float16 holds it.
"""


def frame_mask(lens_B: Tensor, num_frames: int) -> Tensor:
    """Bool (B, num_frames): True on the first ``lens_B`` frames of each utterance."""
    return torch.arange(num_frames, device=lens_B.device) < lens_B.unsqueeze(1)


def valid_frames(values_BT: Tensor, lens_B: Tensor) -> Tensor:
    """The valid frames of (B, T, ...) one after the other: (N, ...), N = sum of ``lens_B``."""
    return values_BT[frame_mask(lens_B, values_BT.shape[1])]


def full_precision(values: Tensor) -> Tensor:
    """float32 of bf16 and fp16 tensors, others unchanged: sums and recursions over frames need it."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def check_aligned(student_lens_B: Tensor, target_lens_B: Tensor) -> None:
    """Refuse targets whose frame counts are not the student's; nothing is ever cropped.

    Raises:
        DataError: with the first utterance's counts.
    """
    if student_lens_B.shape != target_lens_B.shape:
        raise DataError(
            f"the batch has {len(student_lens_B)} utterances, its targets {len(target_lens_B)}",
            remedy="compute the targets again from these cuts (stage 4)",
        )
    differs_B = student_lens_B != target_lens_B.to(student_lens_B.device)
    if bool(differs_B.any()):
        row = int(differs_B.nonzero()[0])
        raise DataError(
            f"{int(differs_B.sum())} of {len(differs_B)} utterances have other frame counts in student and "
            f"targets; utterance {row} of the batch has {int(student_lens_B[row])} and "
            f"{int(target_lens_B[row])}",
            remedy="teacher and student must subsample by the same rule, and see the same cuts; "
            "targets are never cropped to fit",
        )


def keep_top(posteriors: Posteriors, top_k: int | None) -> Posteriors:
    """At most ``top_k`` classes per frame, the others' mass moved into the tail.

    Unchanged if ``top_k`` is None or not below the K there is. Kept classes come in falling order.
    """
    num_kept = posteriors.log_probs_BTK.shape[-1]
    if top_k is None or top_k >= num_kept:
        return posteriors
    order_BTK = posteriors.log_probs_BTK.argsort(dim=-1, descending=True, stable=True)
    sorted_BTK = posteriors.log_probs_BTK.gather(-1, order_BTK)
    log_tail_BT = sorted_BTK[..., top_k:].logsumexp(-1)
    if posteriors.log_tail_BT is not None:
        log_tail_BT = torch.logaddexp(log_tail_BT, posteriors.log_tail_BT)
    indices_BTK = order_BTK[..., :top_k]
    if posteriors.indices_BTK is not None:
        indices_BTK = posteriors.indices_BTK.gather(-1, indices_BTK)
    return Posteriors(sorted_BTK[..., :top_k], posteriors.lens_B, indices_BTK, log_tail_BT)


def all_classes(posteriors: Posteriors, num_classes: int) -> Posteriors:
    """Posteriors over all V classes in order, for losses that can't take several classes as one.

    A single class that is left out is known: it has the tail's mass.

    Args:
        posteriors: of all classes, in any order, or of all but one.
        num_classes: V.

    Raises:
        DataError: more than one class was left out.
    """
    if posteriors.indices_BTK is None:
        return posteriors
    num_kept = posteriors.log_probs_BTK.shape[-1]
    if num_kept < num_classes - 1:
        raise DataError(
            f"the targets have {num_kept} of {num_classes} classes per frame, this loss needs all of them",
            remedy="leave out top_k, or use a loss that takes the rest as one class (kl)",
        )
    log_tail_BT = posteriors.log_tail_BT
    if log_tail_BT is None:
        log_tail_BT = torch.full_like(posteriors.log_probs_BTK[..., 0], MIN_LOG_PROB)
    every_BTV = log_tail_BT[..., None].repeat(1, 1, num_classes)
    log_probs_BTV = every_BTV.scatter(-1, posteriors.indices_BTK, posteriors.log_probs_BTK)
    return Posteriors(log_probs_BTV, posteriors.lens_B)


def blank_probs(posteriors: Posteriors) -> Tensor:
    """(B, T) posterior of the blank; where it is not among the kept classes, the most it can be."""
    probs_BTK = posteriors.log_probs_BTK.exp()
    if posteriors.indices_BTK is None:
        return probs_BTK[..., BLANK_ID]
    is_blank_BTK = posteriors.indices_BTK == BLANK_ID
    blank_BT = probs_BTK.where(is_blank_BTK, 0.0).sum(-1)
    if posteriors.log_tail_BT is None:
        return blank_BT
    most_BT = probs_BTK.amin(-1).minimum(posteriors.log_tail_BT.exp())
    return blank_BT.where(is_blank_BTK.any(-1), most_BT)


def over_tokens(posteriors: Posteriors, origin: Sequence[int | None]) -> Posteriors:
    """A teacher's posteriors over its own tokens as those over a list that was trimmed from them.

    The mass of tokens that the list lacks becomes the tail.

    Args:
        posteriors: over all of the teacher's tokens.
        origin: the teacher's id of each token of the list; None: it has no such token, such as a blank.

    Raises:
        DataError: the posteriors are not over all tokens that the list comes from.
    """
    kept = [new for new, old in enumerate(origin) if old is not None]
    old_K = torch.tensor([old for old in origin if old is not None], device=posteriors.log_probs_BTK.device)
    num_classes = posteriors.log_probs_BTK.shape[-1]
    if posteriors.indices_BTK is not None or int(old_K.max()) >= num_classes:
        raise DataError(
            f"posteriors over {num_classes} classes are not those of the teacher that the tokens come from",
            where="tokens",
            remedy="let the teacher that tokens names teach, and take its top_k afterwards",
        )
    is_other_V = torch.ones(num_classes, dtype=torch.bool, device=old_K.device).index_fill(0, old_K, False)
    log_probs_BTK = posteriors.log_probs_BTK[..., old_K]
    log_tail_BT = posteriors.log_probs_BTK[..., is_other_V].logsumexp(-1)
    indices_BTK = torch.tensor(kept, device=old_K.device).expand_as(log_probs_BTK)
    return Posteriors(log_probs_BTK, posteriors.lens_B, indices_BTK, log_tail_BT)


def bucket_log_probs(logits_NV: Tensor, indices_NK: Tensor | None) -> Tensor:
    """Log-posteriors of the kept classes and, last, of all others together: (N, K + 1).

    With ``indices_NK`` None, or K = V, nothing is left over and the result is (N, V).
    """
    log_probs_NV = logits_NV.log_softmax(-1)
    if indices_NK is None:
        return log_probs_NV
    kept_NK = log_probs_NV.gather(-1, indices_NK)
    if indices_NK.shape[-1] == logits_NV.shape[-1]:
        return kept_NK
    # The sum of what is left, not 1 minus what is kept: that would lose a tail below 1e-7.
    tail_N1 = log_probs_NV.scatter(-1, indices_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, tail_N1], dim=-1)


def frame_log_probs(logits_BTV: Tensor, lens_B: Tensor, teacher: Posteriors) -> tuple[Tensor, Tensor]:
    """Log-posteriors of teacher and student over the same classes, valid frames in a row.

    With top-k targets the classes are the K kept ones and, last, all others together (K + 1).
    The teacher's carry no gradient and are :data:`MIN_LOG_PROB` at least (a teacher may rule classes
    out); both have the student's type, float32 at least.

    Args:
        logits_BTV: the student's, not normalised.
        lens_B: the student's valid frames.
        teacher: full posteriors or the top k.

    Returns:
        The teacher's (N, K) and the student's (N, K).

    Raises:
        DataError: the frame counts differ.
    """
    check_aligned(lens_B, teacher.lens_B)
    logits_NV = full_precision(valid_frames(logits_BTV, lens_B))
    log_p_NK = valid_frames(teacher.log_probs_BTK, teacher.lens_B)
    indices_NK = None if teacher.indices_BTK is None else valid_frames(teacher.indices_BTK, teacher.lens_B)
    if teacher.log_tail_BT is not None:
        tail_N = valid_frames(teacher.log_tail_BT, teacher.lens_B)
        log_p_NK = torch.cat([log_p_NK, tail_N[:, None]], dim=-1)
    log_p_NK = log_p_NK.detach().to(logits_NV.dtype).clamp(min=MIN_LOG_PROB)
    return log_p_NK, bucket_log_probs(logits_NV, indices_NK)


def ctc_greedy(scores_BTV: Tensor, lens_B: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy search of CTC: the best label of each frame, repeats merged, blanks removed.

    Args:
        scores_BTV: logits or log-posteriors; padding may hold anything.
        lens_B: valid frames.

    Returns:
        Tokens of each utterance, and the frame at which each of them begins.
    """
    return ctc_text(scores_BTV.argmax(-1), lens_B)


def ctc_text(best_BT: Tensor, lens_B: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """As :func:`ctc_greedy`, of the best labels (B, T) int64."""
    previous_BT = F.pad(best_BT[:, :-1], (1, 0), value=BLANK_ID)
    starts_BT = (best_BT != BLANK_ID) & (best_BT != previous_BT) & frame_mask(lens_B, best_BT.shape[1])
    frames = [row_T.nonzero().flatten().tolist() for row_T in starts_BT]
    tokens = [row_T[at].tolist() for row_T, at in zip(best_BT, frames, strict=True)]
    return tokens, frames


def ctc_nll(logits_BTV: Tensor, lens_B: Tensor, tokens_BU: Tensor, token_lens_B: Tensor) -> Tensor:
    """(B,) -log P(text | audio) of CTC, the sum over all alignments; float32 at least.

    0, without gradient, where there are fewer frames than :func:`frames_needed`.

    Args:
        logits_BTV: not normalised; padding may hold anything.
        lens_B: valid frames.
        tokens_BU: int64, without blanks; padding may hold anything.
        token_lens_B: int64.
    """
    return F.ctc_loss(
        full_precision(logits_BTV).log_softmax(-1).transpose(0, 1),
        tokens_BU,
        lens_B,
        token_lens_B,
        blank=BLANK_ID,
        reduction="none",
        zero_infinity=True,
    )


def ctc_nll_of_texts(logits_BTV: Tensor, lens_B: Tensor, tokens_BNU: Tensor, token_lens_BN: Tensor) -> Tensor:
    """(B, N) of N texts per utterance, see :func:`ctc_nll`."""
    texts = zip(tokens_BNU.unbind(1), token_lens_BN.unbind(1), strict=True)
    return torch.stack([ctc_nll(logits_BTV, lens_B, *text) for text in texts], dim=1)


def frames_needed(tokens_BU: Tensor, token_lens_B: Tensor) -> Tensor:
    """(B,) the fewest frames CTC can spell the tokens in: one each, and a blank within doubles."""
    doubled = tokens_BU[:, 1:] == tokens_BU[:, :-1]  # (B, max(U - 1, 0))
    within = frame_mask(token_lens_B - 1, doubled.shape[1])
    return token_lens_B + (doubled & within).sum(1)


def edit_distance(reference: Sequence[int], hypothesis: Sequence[int]) -> int:
    """Fewest substitutions, insertions and deletions between two sequences."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]
