"""The teacher's weight falls while training goes on, and the student's own earlier predictions take over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError
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

OWN = "ema"  # the teacher that is the student's own moving average


class AdaptiveSelfKd:
    """``T^2 * sum over frames (or tokens) of (1 - s) KL(p_teacher || q) + s KL(p_own || q)``.

    s rises from ``start`` to ``end`` over ``steps``; p_own are the posteriors of the student's own moving
    average, so the system's teachers are a teacher and ``ema``. Several teachers share (1 - s) evenly. After
    the abstract of adaptive self-knowledge distillation (Lee 2026, arXiv 2601.19919): depend on the teacher
    less and less, so that its blind spots are not inherited. The line of s and the average are ours; the
    paper's own formulas may differ.

    Count: the frames or tokens. Metric ``agree``: those whose best class is that of the own average.

    Raises:
        RecipeError: ``ema`` is not among the teachers, or the only one; tokens differ; the student lacks the
            head.
        DataError: frame counts differ.
    """

    all_teachers: ClassVar[bool] = True
    contract_options: ClassVar[Mapping[str, Any]] = {"steps": 100}
    contract_teachers: ClassVar[tuple[str, ...]] = ("teacher", OWN)

    class Config(HeadOptions):
        """Options of ``askd``.

        Args:
            steps: in which s reaches ``end``; a run of fewer steps gets there, too.
            start: s at the first step, in [0, 1).
            end: s in the end, at most 1: the own average alone.
            temperature: T, above 0.
            top_k: classes kept per frame; None: all.
        """

        steps: int = Field(ge=1)
        start: float = Field(0.0, ge=0, lt=1)
        end: float = Field(1.0, gt=0, le=1)
        temperature: float = Field(1.0, gt=0)
        top_k: int | None = Field(None, ge=1)

        @model_validator(mode="after")
        def _fits(self) -> AdaptiveSelfKd.Config:
            if self.start > self.end:
                raise ValueError(f"s rises from start to end, not from {self.start:g} to {self.end:g}")
            return self

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head(config.head, "askd")
        setup.require_same_tokens("askd")
        if setup.teachers and (OWN not in setup.teachers or len(setup.teachers) == 1):
            raise RecipeError(
                f"askd goes from a teacher to the student's own average; the teachers are "
                f"{', '.join(setup.teachers)}",
                remedy=f"teachers: [<a system>, {OWN}]",
            )

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """Posteriors of each teacher."""
        return config.needs()

    def __call__(
        self, out: ModelOutput, targets: Mapping[str, Targets], batch: Batch, *, progress: Progress
    ) -> LossOutput:
        """Sum over frames or tokens; see the class."""
        config, head = self.config, self.config.head
        lens_B = config.lens_B(out, batch)
        own_share = config.start + (config.end - config.start) * progress.share(config.steps)
        total, agree = out.logits[head].new_zeros(()), out.lens_B.new_zeros(())
        for name, said in targets.items():
            both = compare(out.logits[head], lens_B, config.said(said), config.temperature)
            share = own_share if name == OWN else (1 - own_share) / (len(targets) - 1)
            total = total + share * config.temperature**2 * kl(both.log_p_NK, both.log_q_NK).sum()
            if name == OWN:
                agree = both.agree()
        return LossOutput(total, lens_B.sum(), {"agree": agree})


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``askd`` known."""
    register("askd", AdaptiveSelfKd)
