"""KL from a target that moves from the student's own posteriors to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import (
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Progress,
    Targets,
    TargetSpec,
)

from .posteriors import HeadOptions, compare, kl


class Taid(nn.Module):
    """``sum over frames (or tokens) of KL(p_t || q)``, ``p_t = softmax((1 - t) sg z_q + t z_p)``.

    Temporally adaptive interpolated distillation (Shing 2025, arXiv 2501.16937; checked against the authors'
    code): z_p and z_q are the logits of teacher and student, sg stops the gradient. t rises from ``start`` to
    ``end`` over ``steps``, linearly or faster. Faster as long as the loss falls: after each step
    ``m = beta m + (1 - beta) (previous - loss) / previous`` and ``t = t + alpha sigmoid(m) (1 - t)``, never
    below the line. ``alpha: 0`` leaves the line alone.

    For a teacher so much larger that its posteriors are out of the student's reach at first. Log-posteriors
    stand for logits, of which they differ by a constant per frame. t is kept with the checkpoint.

    Count: the frames or tokens. Metric ``agree``: those whose best class is the teacher's.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head.
        DataError: their frame counts differ.
    """

    contract_options: ClassVar[Mapping[str, Any]] = {"steps": 100}
    expected_failed_checks: ClassVar[dict[str, str]] = {
        "gradcheck": "the stop-gradient is part of the loss: its gradient is not that of its value",
    }

    class Config(HeadOptions):
        """Options of ``taid``.

        Args:
            steps: in which t rises to ``end``; a run of fewer steps gets there, too.
            start: t at the first step, in [0, 1).
            end: t in the end, at most 1, which is the teacher.
            alpha: how much faster than the line t may rise, per step.
            beta: of the momentum over the loss's relative change.
            top_k: classes kept per frame; None: all.
        """

        steps: int = Field(ge=1)
        start: float = Field(0.4, ge=0, lt=1)
        end: float = Field(1.0, gt=0, le=1)
        alpha: float = Field(5e-4, ge=0, le=1)
        beta: float = Field(0.99, ge=0, lt=1)
        top_k: int | None = Field(None, ge=1)

        @model_validator(mode="after")
        def _fits(self) -> Taid.Config:
            if self.start > self.end:
                raise ValueError(f"t rises from start to end, not from {self.start:g} to {self.end:g}")
            return self

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(self, config: Config, setup: LossSetup) -> None:
        super().__init__()
        self.config = config
        setup.require_head(config.head, "taid")
        setup.require_same_tokens("taid")
        self.register_buffer("t", torch.tensor(config.start, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("previous", torch.tensor(math.inf, dtype=torch.float64))

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors."""
        return config.needs()

    def at(self, progress: Progress) -> float:
        """t at a step: that of the line, or further."""
        start, end = self.config.start, self.config.end
        return min(end, max(float(self.t), start + (end - start) * progress.share(self.config.steps)))

    def forward(self, out: ModelOutput, targets: Targets, batch: Batch, *, progress: Progress) -> LossOutput:
        """Sum over the frames or tokens; see the class."""
        config = self.config
        both = compare(out.logits[config.head], config.lens_B(out, batch), config.said(targets))
        between_NK = torch.lerp(both.log_q_NK.detach(), both.log_p_NK, self.at(progress)).log_softmax(-1)
        total = kl(between_NK, both.log_q_NK).sum()
        return LossOutput(total, len(both.log_q_NK), {"agree": both.agree()})

    @torch.no_grad()
    def after_step(self, value: float, progress: Progress) -> None:
        """Move t on, by how the loss changed."""
        config, t = self.config, self.at(progress)
        if not math.isfinite(value):  # a step that the scaler of fp16 leaves out
            return
        if math.isfinite(float(self.previous)):
            change = (float(self.previous) - value) / (float(self.previous) + 1e-15)
            self.momentum.mul_(config.beta).add_((1 - config.beta) * change)
            t += config.alpha * float(self.momentum.sigmoid()) * (1 - t)
        self.t.fill_(min(config.end, t))
        self.previous.fill_(value)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``taid`` known."""
    register("taid", Taid)
