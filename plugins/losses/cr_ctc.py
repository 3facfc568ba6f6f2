"""Consistency of CTC posteriors between two augmented views: self-distillation without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.frames import full_precision, valid_frames
from kdrecipe.interfaces import (
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Progress,
    Targets,
    TargetSpec,
)


class CrCtc:
    """``sum over frames of (KL(sg a || b) + KL(sg b || a)) / 2``, sg: no gradient.

    a and b are the student's CTC posteriors on two views of the same utterances, which SpecAugment masks
    differently (CR-CTC, Yao 2024, arXiv 2410.05101). It needs no labels; the ``ctc`` term beside it sees
    both views. The paper's weight, 0.2, is for sums over an utterance on both sides. Here each term is
    divided by its own count, ``ctc`` by tokens and this one by frames, so 0.2 of the paper is
    ``0.2 * frames per token`` in a recipe: about 1 at 25 frames and 5 tokens a second.

    While a model still emits nothing but blanks, two views agree perfectly, and this term holds it there
    (icefall's PR 2075 reports stalls and divergence). So it begins when the dev error is below a half, unless
    the recipe's ``start_below`` says otherwise; until then there is one view only, at half the cost.

    Count: valid frames of one view.
    """

    num_views: ClassVar[int] = 2
    start_below: ClassVar[float] = 0.5
    expected_failed_checks: ClassVar[dict[str, str]] = {
        "gradcheck": "the stop-gradient is part of the loss: its gradient is not that of its value",
    }

    class Config(Options):
        """Options of ``cr_ctc``.

        Args:
            warmup_steps: in which its weight rises from 0, counted from the step at which it begins.
        """

        warmup_steps: int = Field(0, ge=0)

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "cr_ctc")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """Nothing: the student teaches itself."""
        return []

    def __call__(
        self, out: ModelOutput, targets: Targets, batch: Batch, *, progress: Progress | None = None
    ) -> LossOutput:
        """Sum over the valid frames of one view; see the class."""
        a_NV, b_NV = (_log_probs(view) for view in out.views())
        total = (_kl(a_NV.detach(), b_NV) + _kl(b_NV.detach(), a_NV)) / 2
        if progress is not None:
            total = total * progress.share(self.config.warmup_steps)
        agree = (a_NV.argmax(-1) == b_NV.argmax(-1)).sum()
        return LossOutput(total, len(a_NV), {"agree": agree})


def _log_probs(view: ModelOutput) -> Tensor:
    return full_precision(valid_frames(view.logits["ctc"], view.lens_B)).log_softmax(-1)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """Sum of KL(p || q), both log-posteriors."""
    return F.kl_div(q_NV, p_NV, reduction="sum", log_target=True)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``cr_ctc`` known."""
    register("cr_ctc", CrCtc)
