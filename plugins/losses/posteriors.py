"""What losses between the posteriors of teacher and student share: :class:`PosteriorLoss`.

B utterances, T frames (or tokens), N of them in a row, V vocabulary, K classes compared: all V, or the kept
ones and, last, all others together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kdrecipe.frames import all_classes, blank_probs, frame_log_probs, frame_mask, keep_top, valid_frames
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


class HeadOptions(Options):
    """Whose posteriors are compared.

    Args:
        head: whose posteriors: ``ctc`` or ``attention``, of both teacher and student.
        align: of ``head: ctc``, where the teacher's frames are not the student's: ``mean``, ``stride`` or
            ``interpolate``, see :mod:`kdrecipe.targets.align`; None: they must be.
    """

    head: Literal["ctc", "attention"] = "ctc"
    align: Align | None = None

    @model_validator(mode="after")
    def _frames_are_ctc(self) -> HeadOptions:
        if self.head != "ctc" and self.align is not None:
            raise ValueError(f"align is for head: ctc; {self.head} goes by tokens")
        return self

    @property
    def kind(self) -> TargetKind:
        """Of the targets that are compared."""
        return "frame_logits" if self.head == "ctc" else "token_logits"

    def needs(self) -> list[TargetSpec]:
        """The posteriors, of each teacher."""
        return [TargetSpec(self.kind, self.head, top_k=getattr(self, "top_k", None), align=self.align)]

    def said(self, targets: Targets) -> Posteriors:
        """What a teacher says, as many classes of it as the options want."""
        return keep_top(targets.posteriors(self.head, self.kind), getattr(self, "top_k", None))

    def lens_B(self, out: ModelOutput, batch: Batch) -> Tensor:
        """Frames of each utterance, or tokens and the end of the sentence."""
        return out.lens_B if self.head == "ctc" else batch.token_lens_B + 1


class FrameOptions(HeadOptions):
    """On which frames.

    Args:
        blank: of ``head: ctc``; ``keep``: all frames; ``drop``: not where the teacher's blank
            posterior is above ``blank_threshold``; ``select``: the others of ``drop`` and
            ``neighbours`` frames on each side of them; ``weight``: all, weighted by 1 - blank posterior.
        blank_threshold: in [0.5, 1), for ``drop`` and ``select``; 0.5 drops the frames whose best class
            is the blank, save those where it wins with less than half.
        neighbours: frames on each side, for ``select``.
    """

    blank: Literal["keep", "drop", "select", "weight"] = "keep"
    # From 0.5 on, a blank above the threshold is the best class and so among any top k.
    blank_threshold: float = Field(0.5, ge=0.5, lt=1)
    neighbours: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _blanks_are_ctc(self) -> FrameOptions:
        if self.head != "ctc" and self.blank != "keep":
            raise ValueError(f"blank: {self.blank} is for head: ctc; the tokens of {self.head} have no blank")
        return self


class SoftOptions(FrameOptions):
    """How much both are softened.

    Args:
        temperature: T, above 0; 1 leaves the posteriors as they are.
    """

    temperature: float = Field(1.0, gt=0)


class TopKOptions(SoftOptions):
    """Top-k targets; all other classes count as one.

    Args:
        top_k: classes kept per frame; None: all.
    """

    top_k: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Compared:
    """Softened log-posteriors of the frames that are used, in a row.

    Args:
        log_p_NK: the teacher's, without gradient.
        log_q_NK: the student's.
        blank_N: int64, which of the K is the blank, or holds it.
        rows_N: int64, the utterance of each frame.
    """

    log_p_NK: Tensor
    log_q_NK: Tensor
    blank_N: Tensor
    rows_N: Tensor

    def agree(self) -> Tensor:
        """How many of the frames have the same best class."""
        return (self.log_p_NK.argmax(-1) == self.log_q_NK.argmax(-1)).sum()

    def where(self, used_N: Tensor) -> Compared:
        """Some of the frames."""
        return Compared(
            self.log_p_NK[used_N], self.log_q_NK[used_N], self.blank_N[used_N], self.rows_N[used_N]
        )


class PosteriorLoss:
    """``T^2 * sum over frames (or tokens) of`` :meth:`divergence`, teacher and student both softened by T.

    A loss derives from it, says its ``name``, gives its ``Config`` one of the options above as base, and
    defines :meth:`divergence`. ``all_classes = True`` is for formulas in which several classes can't count
    as one; such a loss has no option ``top_k``, and narrower targets are refused.

    Count: the frames or tokens used. Metric ``agree``: those whose best class is the teacher's.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head.
        DataError: their frame counts differ.
    """

    name: ClassVar[str]
    all_classes: ClassVar[bool] = False

    def __init__(self, config: Any, setup: LossSetup) -> None:
        self.config = config
        setup.require_head(config.head, self.name)
        setup.require_same_tokens(self.name)

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """The teacher's posteriors."""
        needs: list[TargetSpec] = config.needs()
        return needs

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over the used frames or tokens; see the class."""
        config = self.config
        teacher, logits_BTV = config.said(targets), out.logits[config.head]
        if self.all_classes:
            teacher = all_classes(teacher, logits_BTV.shape[-1])
        temperature = getattr(config, "temperature", 1.0)
        both = compare(logits_BTV, config.lens_B(out, batch), teacher, temperature)
        if config.blank in ("drop", "select"):
            both = both.where(valid_frames(used_frames(teacher, config), teacher.lens_B))
        values_N = self.divergence(both)
        if config.blank == "weight":
            blank_N = valid_frames(blank_probs(teacher), teacher.lens_B).detach()
            values_N = values_N * (1 - blank_N).to(values_N.dtype)
        return LossOutput(temperature**2 * values_N.sum(), len(values_N), {"agree": both.agree()})

    def divergence(self, both: Compared) -> Tensor:
        """(N,) of each frame; least where both say the same."""
        raise NotImplementedError


def compare(logits_BTV: Tensor, lens_B: Tensor, teacher: Posteriors, temperature: float = 1.0) -> Compared:
    """Both posteriors over the same classes, softened; see :func:`kdrecipe.frames.frame_log_probs`."""
    log_p_NK, log_q_NK = frame_log_probs(logits_BTV, lens_B, teacher)
    rows_N = frame_mask(lens_B, logits_BTV.shape[1]).nonzero(as_tuple=True)[0]
    blank_N = torch.zeros_like(rows_N) + BLANK_ID
    if teacher.indices_BTK is not None:
        is_blank_NK = valid_frames(teacher.indices_BTK, teacher.lens_B) == BLANK_ID
        blank_N = is_blank_NK.int().argmax(-1).where(is_blank_NK.any(-1), log_p_NK.shape[-1] - 1)
    both = Compared(log_p_NK, log_q_NK, blank_N, rows_N)
    if temperature == 1:
        return both
    soft = ((x / temperature).log_softmax(-1) for x in (log_p_NK, log_q_NK))
    return replace(both, **dict(zip(("log_p_NK", "log_q_NK"), soft, strict=True)))


def kl(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """(N,) KL(p || q)."""
    return F.kl_div(log_q_NK, log_p_NK, reduction="none", log_target=True).sum(-1)


def used_frames(teacher: Posteriors, config: FrameOptions) -> Tensor:
    """Bool (B, T): the frames that ``blank: drop`` or ``select`` leaves, padding excluded."""
    valid_BT = frame_mask(teacher.lens_B, teacher.log_probs_BTK.shape[1])
    spoken_BT = valid_BT & (blank_probs(teacher) <= config.blank_threshold)
    if config.blank == "drop" or config.neighbours == 0 or spoken_BT.numel() == 0:
        return spoken_BT
    width = 2 * config.neighbours + 1
    near_BT = F.max_pool1d(spoken_BT[:, None].float(), width, stride=1, padding=config.neighbours)[:, 0]
    return valid_BT & (near_BT > 0)
