"""Distillation of a transducer: over its lattice (next token, blank, or any other token), or its text's
probability.

B utterances, T frames, P lattice positions, N frames in a row, R positions kept per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB, check_aligned, frame_mask
from kdrecipe.interfaces import (
    Batch,
    Lattice,
    LatticePosteriors,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Targets,
    TargetSpec,
)
from kdrecipe.lattice import (
    MIN_RANGE,
    Cells,
    cells_log_likelihood,
    joined_cells,
    simple_pass,
    three_classes,
)
from kdrecipe.lattice.paths import lattice_log_likelihood

from .sequences import distances


class RnntKlLoss:
    """``T^2 * sum over frames of the mean of KL(teacher || student)`` over the frame's kept positions.

    The three classes are the text's next token, the blank, and all other tokens together
    (Panchapagesan 2020, arXiv 2011.06110); after the last token there is no next one and there are
    two. The positions are those of the student's pruned lattice, which the loss ``rnnt`` needs as well:
    both share one forward pass, if their ranges are the same and ``rnnt`` has its default ``lm_scale`` and
    ``am_scale``. The text is the transcript, or the teacher's hypothesis where there is none.

    The mean over the positions of a frame, not the paper's sum over the whole lattice, so that a frame has
    the same weight as in ``kl``, and long texts no more than short ones. Over the student's pruned positions
    with ``places: occupancy``, no weight goes to where no path is likely to pass.

    Count: the frames. Metric ``agree``: that share of the frames (by the positions' weights) whose best
    class is the teacher's.

    Raises:
        RecipeError: the student has no head ``rnnt``, or other tokens than the teacher.
        DataError: their frame counts or their texts differ.
    """

    class Config(Options):
        """Options of ``rnnt_kl``.

        Args:
            range: positions per frame, at least 2.
            temperature: T, above 0; it softens the three classes.
            places: weights of a frame's positions: ``uniform``, or ``occupancy``: the probability that a path
                of the student's simple joiner passes there, divided by its sum over the positions.
            full: all positions of the lattice: far more memory, for comparisons.
        """

        range: int = Field(5, ge=MIN_RANGE)
        temperature: float = Field(1.0, gt=0)
        places: Literal["uniform", "occupancy"] = "uniform"
        full: bool = False

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("rnnt", "rnnt_kl")
        setup.require_same_tokens("rnnt_kl")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors over the lattice."""
        return [TargetSpec("rnnt_lattice", "rnnt")]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the valid frames; see the class."""
        lattice, teacher = out.lattices["rnnt"], targets.lattice("rnnt")
        check_same_lattice(lattice, targets)
        cells = joined_cells(lattice, None if self.config.full else self.config.range)
        log_q_NR3 = cells.log_probs_NR3
        has_next_NR = cells.positions_NR < lattice.token_lens_B[cells.rows_N, None]
        log_p_NR3 = _at_cells(teacher, cells, has_next_NR).to(log_q_NR3.dtype)
        absent_NR3 = F.pad(~has_next_NR[..., None], (0, 2), value=False)
        log_p_NR3, log_q_NR3 = (
            (x.masked_fill(absent_NR3, MIN_LOG_PROB) / self.config.temperature).log_softmax(-1)
            for x in (log_p_NR3, log_q_NR3)
        )
        kl_NR = F.kl_div(log_q_NR3, log_p_NR3, reduction="none", log_target=True).sum(-1)
        kl_NR = kl_NR.where(cells.valid_NR, torch.zeros_like(kl_NR))
        weights_NR = self._weights(lattice, cells).to(kl_NR.dtype)
        total = self.config.temperature**2 * (kl_NR * weights_NR).sum()
        agree_NR = log_p_NR3.argmax(-1) == log_q_NR3.argmax(-1)
        return LossOutput(total, len(kl_NR), {"agree": (agree_NR * weights_NR).sum()})

    def _weights(self, lattice: Lattice, cells: Cells) -> Tensor:
        """(N, R) of the positions; those of a frame sum to 1."""
        weights_NR = cells.valid_NR.float()
        if self.config.places == "occupancy":
            simple = simple_pass(lattice)
            occupancy_BPT = simple.next_occupancy_BPT + simple.blank_occupancy_BPT
            at = cells.rows_N[:, None], cells.positions_NR, cells.frames_N[:, None]
            # not 0: a frame whose positions no path visits is still a frame
            weights_NR = weights_NR * occupancy_BPT[at].float().clamp(min=1e-6)
        return weights_NR / weights_NR.sum(1, keepdim=True)


def _at_cells(teacher: LatticePosteriors, cells: Cells, has_next_NR: Tensor) -> Tensor:
    """(N, R, 3) of the teacher at the student's cells, without gradient."""
    log_probs_BTP2 = teacher.log_probs_BTP2.detach()
    # the student's may be padded more
    positions_NR = cells.positions_NR.clamp(max=log_probs_BTP2.shape[2] - 1)
    two_NR2 = log_probs_BTP2[cells.rows_N[:, None], cells.frames_N[:, None], positions_NR]
    next_NR = two_NR2[..., 0].where(has_next_NR, -torch.inf)
    found = three_classes(torch.stack([next_NR, two_NR2[..., 1]], dim=-1))
    return found.clamp(min=MIN_LOG_PROB)  # a teacher may rule classes out


def check_same_lattice(student: Lattice, targets: Targets) -> None:
    """Refuse targets over another lattice than the student's.

    Raises:
        DataError: with the first utterance that differs.
    """
    teacher = targets.lattice("rnnt")
    check_aligned(student.lens_B, teacher.lens_B)
    differs_B = student.token_lens_B != teacher.token_lens_B.to(student.token_lens_B.device)
    if targets.tokens_BU is not None and not bool(differs_B.any()):
        width = min(targets.tokens_BU.shape[1], student.tokens_BU.shape[1])
        differs_BU = student.tokens_BU[:, :width] != targets.tokens_BU[:, :width]
        differs_B = (differs_BU & frame_mask(student.token_lens_B, width)).any(1)
    if bool(differs_B.any()):
        row = int(differs_B.nonzero()[0])
        raise DataError(
            f"{int(differs_B.sum())} of {len(differs_B)} utterances have other texts in student and targets; "
            f"utterance {row} of the batch has {int(student.token_lens_B[row])} and "
            f"{int(teacher.token_lens_B[row])} tokens",
            remedy="the student must be forced along the text of the targets (Targets.tokens_BU)",
        )


class RnntFullSum:
    """``sum over utterances of d(log P_teacher(y), log P_student(y))``, y the text, P its sum over all paths.

    Full-sum distillation (after Zeineldeen 2023, arXiv 2303.05958): the student learns how probable the
    teacher finds a text, not where it finds its tokens, so their alignments need not agree, and a poor
    teacher's text is not taken for true. d is the absolute difference (``distance: l1``) or its square
    (``l2``). y is the transcript, or the teacher's hypothesis where there is none. The student's sum is over
    its pruned lattice, which it shares with the loss ``rnnt`` as ``rnnt_kl`` does.

    The paper's form over several texts is ``ctc_full_sum`` here: a transducer's predictor would have to run
    along each of them.

    Empty texts are left out. Count: tokens of the texts.

    Raises:
        RecipeError: the student has no head ``rnnt``, or other tokens than the teacher.
        DataError: their frame counts or their texts differ.
    """

    expected_failed_checks: ClassVar[dict[str, str]] = {
        "minimum_at_teacher": "an absolute difference has no gradient of 0 beside its least, only at it",
    }

    class Config(Options):
        """Options of ``rnnt_full_sum``.

        Args:
            distance: ``l1`` or ``l2``.
            range: positions per frame, at least 2.
            full: all positions of the lattice: far more memory, for comparisons.
        """

        distance: Literal["l1", "l2"] = "l1"
        range: int = Field(5, ge=MIN_RANGE)
        full: bool = False

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("rnnt", "rnnt_full_sum")
        setup.require_same_tokens("rnnt_full_sum")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors over the lattice; float32, since hundreds of them are summed."""
        return [TargetSpec("rnnt_lattice", "rnnt", dtype="float32")]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the utterances; see the class."""
        lattice, teacher = out.lattices["rnnt"], targets.lattice("rnnt")
        check_same_lattice(lattice, targets)
        next_BPT, blank_BPT = teacher.log_probs_BTP2.detach().permute(3, 0, 2, 1)
        log_p_B = lattice_log_likelihood(next_BPT, blank_BPT, teacher.lens_B, teacher.token_lens_B)
        cells = joined_cells(lattice, None if self.config.full else self.config.range)
        log_q_B = cells_log_likelihood(lattice, cells)
        used_B = (lattice.token_lens_B > 0) & (lattice.lens_B > 0) & log_p_B.isfinite() & log_q_B.isfinite()
        # chosen, not multiplied: what is left out must not bring NaN along
        total = distances(log_p_B.to(log_q_B.dtype)[used_B], log_q_B[used_B], self.config.distance).sum()
        return LossOutput(total, lattice.token_lens_B[used_B].sum())


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``rnnt_kl`` and ``rnnt_full_sum`` known."""
    register("rnnt_kl", RnntKlLoss)
    register("rnnt_full_sum", RnntFullSum)
