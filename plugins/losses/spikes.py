"""Losses for CTC models whose spikes come at other times than the teacher's.

CTC emits a token on one or two frames, and where is arbitrary: two good models often disagree frame by frame.

B utterances, T frames, N valid frames in a row, S delays, K classes compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.frames import check_aligned, frame_mask, full_precision, keep_top, valid_frames
from kdrecipe.interfaces import (
    BLANK_ID,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Posteriors,
    Targets,
    TargetSpec,
)

from .posteriors import compare, kl


class GuidedCtc:
    """``-sum over spikes of q_t(k)``: the student's posterior of the teacher's best class k, not the blank.

    Added to the student's ``ctc``, it draws its spikes to where the teacher, the guide, has them (Kurata &
    Audhkhasi 2019, arXiv 1904.08311). Models that had the same guide can then be averaged frame by frame, and
    teach by ``kl``. With ``log: true`` it is the cross-entropy -log q_t(k), which is steep where the
    student is far off.

    Only the best class of each frame is cached.

    Count: the spikes, that is frames on which the teacher's best class is a token. Metric ``agree``: those on
    which it is the student's, too.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head ``ctc``.
        DataError: their frame counts differ.
    """

    expected_failed_checks: ClassVar[dict[str, str]] = {
        "minimum_at_teacher": "it is least where the student is certain of the teacher's best class",
    }

    class Config(Options):
        """Options of ``guided_ctc``.

        Args:
            log: -log q in place of the paper's -q.
        """

        log: bool = False

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "guided_ctc")
        setup.require_same_tokens("guided_ctc")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's best class of each frame."""
        return [TargetSpec("frame_logits", "ctc", top_k=1)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the spikes; see the class."""
        guide = targets.posteriors("ctc")
        check_aligned(out.lens_B, guide.lens_B)
        best_N = valid_frames(best_classes(guide), guide.lens_B)
        spikes_N = best_N != BLANK_ID
        best_N = best_N[spikes_N]
        log_q_NV = full_precision(valid_frames(out.logits["ctc"], out.lens_B)[spikes_N]).log_softmax(-1)
        log_q_N = log_q_NV.gather(-1, best_N[:, None])[:, 0]
        total = -(log_q_N if self.config.log else log_q_N.exp()).sum()
        return LossOutput(total, len(best_N), {"agree": (log_q_NV.argmax(-1) == best_N).sum()})


def best_classes(posteriors: Posteriors) -> Tensor:
    """int64 (B, T): the class with the highest posterior; what lies in the tail can't be it."""
    best_BT1 = posteriors.log_probs_BTK.argmax(-1, keepdim=True)
    if posteriors.indices_BTK is not None:
        best_BT1 = posteriors.indices_BTK.gather(-1, best_BT1)
    return best_BT1[..., 0]


class ShiftedKl:
    """``T^2 * sum over frames of min over s of KL(p_t || q_{t + s})``, s from ``earliest`` to ``latest``.

    The student may say later what the teacher says at t, as a streaming one must: the temporal alignment
    buffer of Delayed-KD (Li 2025, arXiv 2505.22069), where s is 0 to d. ``per: utterance`` chooses one s for
    all frames of an utterance, by their mean KL; then the frames that have no partner within the utterance
    are left out.

    With top-k targets it is over the K kept classes and the rest, K + 1 classes.

    Count: the teacher's frames that are used. Metrics: ``agree``: those whose best class is that of the
    student's frame; ``delay``: frames of delay, the sum.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head ``ctc``.
        DataError: their frame counts differ.
    """

    class Config(Options):
        """Options of ``shifted_kl``.

        Args:
            earliest: least delay of the student, in frames, at most 0: frames without a partner later have
                one at 0.
            latest: largest delay, at least 0.
            per: ``frame`` or ``utterance``, see the class.
            temperature: T, above 0.
            top_k: classes kept per frame; None: all.
        """

        earliest: int = Field(0, le=0)
        latest: int = Field(2, ge=0)
        per: Literal["frame", "utterance"] = "frame"
        temperature: float = Field(1.0, gt=0)
        top_k: int | None = Field(None, ge=1)

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "shifted_kl")
        setup.require_same_tokens("shifted_kl")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors."""
        return [TargetSpec("frame_logits", "ctc", top_k=config.top_k)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the teacher's frames; see the class."""
        config, logits_BTV = self.config, out.logits["ctc"]
        teacher = keep_top(targets.posteriors("ctc"), config.top_k)
        mask_BT = frame_mask(out.lens_B, logits_BTV.shape[1])
        delays_S = torch.arange(config.earliest, config.latest + 1, device=mask_BT.device)
        with torch.no_grad():  # the gradient of the least is that of the one which is the least
            found = [self._delayed(logits_BTV, out.lens_B, teacher, s * mask_BT.long()) for s in delays_S]
            kl_SN = torch.stack([kl_N.where(exists_N, torch.inf) for kl_N, exists_N, _ in found])
            if config.per == "utterance":
                kl_SN = _means_of_rows(kl_SN, mask_BT.nonzero(as_tuple=True)[0], len(mask_BT))
        delay_N = delays_S[kl_SN.argmin(0)]
        delay_BT = torch.zeros_like(mask_BT, dtype=torch.int64).masked_scatter(mask_BT, delay_N)
        kl_N, exists_N, agree_N = self._delayed(logits_BTV, out.lens_B, teacher, delay_BT)
        metrics = {"agree": agree_N[exists_N].sum(), "delay": delay_N[exists_N].sum()}
        return LossOutput(config.temperature**2 * kl_N[exists_N].sum(), exists_N.sum(), metrics)

    def _delayed(
        self, logits_BTV: Tensor, lens_B: Tensor, teacher: Posteriors, delay_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) KL to the student's frame so much later; whether there is one; whether both agree."""
        num_frames = logits_BTV.shape[1]
        at_BT = torch.arange(num_frames, device=delay_BT.device) + delay_BT
        index_BTV = at_BT.clamp(0, max(0, num_frames - 1))[..., None].expand_as(logits_BTV)
        both = compare(logits_BTV.gather(1, index_BTV), lens_B, teacher, self.config.temperature)
        at_N = valid_frames(at_BT, lens_B)
        exists_N = (at_N >= 0) & (at_N < lens_B[both.rows_N])
        agree_N = both.log_p_NK.argmax(-1) == both.log_q_NK.argmax(-1)
        return kl(both.log_p_NK, both.log_q_NK), exists_N, agree_N


def _means_of_rows(values_SN: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Each value replaced by the mean of its utterance's finite ones; inf where there is none."""
    finite_SN = values_SN.isfinite()
    sums_SB, counts_SB = (
        values_SN.new_zeros(len(values_SN), num_rows).index_add(1, rows_N, x.to(values_SN.dtype))
        for x in (values_SN.where(finite_SN, 0.0), finite_SN)
    )
    means_SB = (sums_SB / counts_SB).where(counts_SB > 0, torch.inf)
    return means_SB[:, rows_N]


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``guided_ctc`` and ``shifted_kl`` known."""
    register("guided_ctc", GuidedCtc)
    register("shifted_kl", ShiftedKl)
