"""KL between a teacher's and the student's posteriors: CTC's by frames, an attention decoder's by tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError
from kdrecipe.frames import frame_log_probs, frame_mask, keep_top, valid_frames
from kdrecipe.interfaces import (
    BLANK_ID,
    Align,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Posteriors,
    TargetKind,
    Targets,
    TargetSpec,
)


class KlLoss:
    """``T^2 * sum over frames (or tokens) of KL(teacher || student)``, both softened by the temperature T.

    The factor T^2 keeps the size of the gradient while T changes (Hinton 2015). With ``head: ctc`` it
    compares frames, with ``head: attention`` the tokens of the transcript and the end of the sentence,
    each given those before it; on unlabelled utterances those of the teacher's own hypothesis.

    CTC posteriors are blank on most frames; ``blank`` says what to do about them (Hilmes 2025, arXiv
    2506.01503, compares elimination and symmetric selection; the weights are TutorNet's, Yoon 2021,
    arXiv 2008.00671).

    A class that the teacher rules out (-inf) weighs nothing; with ``direction: reverse``, where the
    KL would be infinite, it counts as a log-posterior of -1e4.

    With top-k targets, the K kept classes and the mass of all others together are K + 1 classes,
    in both teacher and student: the loss is 0 where they agree, and the full KL for K = V.

    Count: the frames or tokens used. Metric ``agree``: those whose best class is the teacher's.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head.
        DataError: their frame counts differ.
    """

    class Config(Options):
        """Options of ``kl``.

        Args:
            head: whose posteriors: ``ctc`` or ``attention``, of both teacher and student.
            temperature: T, above 0; 1 leaves the posteriors as they are.
            blank: of ``head: ctc``; ``keep``: all frames; ``drop``: not where the teacher's blank
                posterior is above ``blank_threshold``; ``select``: the others of ``drop`` and
                ``neighbours`` frames on each side of them; ``weight``: all, weighted by 1 - blank posterior.
            blank_threshold: in [0.5, 1), for ``drop`` and ``select``; 0.5 drops the frames whose best class
                is the blank, save those where it wins with less than half.
            neighbours: frames on each side, for ``select``.
            direction: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher).
            top_k: classes kept per frame; None: all.
            align: of ``head: ctc``, where the teacher's frames are not the student's: ``mean``, ``stride`` or
                ``interpolate``, see :mod:`kdrecipe.targets.align`; None: they must be.
        """

        head: Literal["ctc", "attention"] = "ctc"
        temperature: float = Field(1.0, gt=0)
        blank: Literal["keep", "drop", "select", "weight"] = "keep"
        # From 0.5 on, a blank above the threshold is the best class and so among any top k.
        blank_threshold: float = Field(0.5, ge=0.5, lt=1)
        neighbours: int = Field(1, ge=0)
        direction: Literal["forward", "reverse"] = "forward"
        top_k: int | None = Field(None, ge=1)
        align: Align | None = None

        @model_validator(mode="after")
        def _frames_are_ctc(self) -> KlLoss.Config:
            if self.head != "ctc" and self.blank != "keep":
                raise ValueError(
                    f"blank: {self.blank} is for head: ctc; the tokens of {self.head} have no blank"
                )
            if self.head != "ctc" and self.align is not None:
                raise ValueError(f"align is for head: ctc; {self.head} goes by tokens")
            return self

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head(config.head, "kl")
        teacher = setup.teacher
        if teacher is not None and teacher.vocab_id != setup.student.vocab_id:
            raise RecipeError(
                f"kl compares posteriors over the same tokens; the student's are {setup.student.vocab_id} "
                f"({setup.student.vocab_size}), the teacher's {teacher.vocab_id} ({teacher.vocab_size})",
                remedy="train both on the same tokens (stage 2), or use a loss on hidden states (hidden_mse)",
            )

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors."""
        kind: TargetKind = "frame_logits" if config.head == "ctc" else "token_logits"
        return [TargetSpec(kind, config.head, top_k=config.top_k, align=config.align)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the used frames or tokens; see the class."""
        config = self.config
        if config.head == "ctc":
            found, lens_B = targets.posteriors("ctc"), out.lens_B
        else:
            found, lens_B = targets.posteriors(config.head, "token_logits"), batch.token_lens_B + 1
        teacher = keep_top(found, config.top_k)
        log_p_NK, log_q_NK = frame_log_probs(out.logits[config.head], lens_B, teacher)
        if config.blank in ("drop", "select"):
            used_N = valid_frames(_used_frames(teacher, config), teacher.lens_B)
            log_p_NK, log_q_NK = log_p_NK[used_N], log_q_NK[used_N]
        kl_N = self._kl(log_p_NK, log_q_NK)
        if config.blank == "weight":
            blank_N = valid_frames(_blank_probs(teacher), teacher.lens_B).detach()
            kl_N = kl_N * (1 - blank_N).to(kl_N.dtype)
        agree = (log_p_NK.argmax(-1) == log_q_NK.argmax(-1)).sum()
        return LossOutput(kl_N.sum(), len(kl_N), {"agree": agree})

    def _kl(self, log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
        """(N,) T^2 KL of softened posteriors, in the direction that is configured."""
        temperature = self.config.temperature
        log_p_NK = (log_p_NK / temperature).log_softmax(-1)
        log_q_NK = (log_q_NK / temperature).log_softmax(-1)
        if self.config.direction == "reverse":
            log_p_NK, log_q_NK = log_q_NK, log_p_NK
        kl_NK = F.kl_div(log_q_NK, log_p_NK, reduction="none", log_target=True)
        return temperature**2 * kl_NK.sum(-1)


def _blank_probs(teacher: Posteriors) -> Tensor:
    """(B, T) posterior of the blank; where it is not among the kept classes, the most it can be."""
    probs_BTK = teacher.log_probs_BTK.exp()
    if teacher.indices_BTK is None:
        return probs_BTK[..., BLANK_ID]
    is_blank_BTK = teacher.indices_BTK == BLANK_ID
    blank_BT = probs_BTK.where(is_blank_BTK, 0.0).sum(-1)
    if teacher.log_tail_BT is None:
        return blank_BT
    most_BT = probs_BTK.amin(-1).minimum(teacher.log_tail_BT.exp())
    return blank_BT.where(is_blank_BTK.any(-1), most_BT)


def _used_frames(teacher: Posteriors, config: KlLoss.Config) -> Tensor:
    """Bool (B, T): the frames that ``drop`` or ``select`` leaves, padding excluded."""
    valid_BT = frame_mask(teacher.lens_B, teacher.log_probs_BTK.shape[1])
    spoken_BT = valid_BT & (_blank_probs(teacher) <= config.blank_threshold)
    if config.blank == "drop" or config.neighbours == 0 or spoken_BT.numel() == 0:
        return spoken_BT
    width = 2 * config.neighbours + 1
    near_BT = F.max_pool1d(spoken_BT[:, None].float(), width, stride=1, padding=config.neighbours)[:, 0]
    return valid_BT & (near_BT > 0)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``kl`` known."""
    register("kl", KlLoss)
