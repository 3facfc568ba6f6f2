"""Loss terms."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kdrecipe.interfaces.batches import Batch, ModelOutput
from kdrecipe.interfaces.common import Options
from kdrecipe.interfaces.models import ModelInfo
from kdrecipe.interfaces.targets import Targets, TargetSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LossOutput:
    """A loss over a batch, not yet normalised.

    Args:
        total: scalar, the *sum* over valid frames, tokens, utterances or pairs of them.
        count: how many of those there were (0 is allowed: total must then be 0).
        metrics: extra numbers to log, sums as well (the loop divides them by count).
    """

    total: Tensor
    count: Tensor | int
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSetup:
    """The pair of models a loss works between; ``teacher`` is None without one.

    A loss with ``all_teachers`` has them in ``teachers`` by name, and no ``teacher``.
    """

    student: ModelInfo
    teacher: ModelInfo | None = None
    teachers: Mapping[str, ModelInfo] = field(default_factory=dict)

    def require_head(self, head: str, loss: str) -> None:
        """Refuse a student without ``head``, which ``loss`` reads.

        Raises:
            RecipeError: naming the heads that there are.
        """
        from kdrecipe.errors import RecipeError

        if head not in self.student.heads:
            raise RecipeError(
                f"{loss!r} reads the head {head!r}; the student has {', '.join(self.student.heads)}",
                remedy=f"add {head}: {{}} to the model's heads, or remove the loss",
            )

    def require_same_tokens(self, loss: str) -> None:
        """Refuse a teacher whose tokens are not the student's, which ``loss`` compares.

        Raises:
            RecipeError: saying which tokens each has.
        """
        from kdrecipe.errors import RecipeError

        student = self.student
        for teacher in (*([self.teacher] if self.teacher else []), *self.teachers.values()):
            if teacher.vocab_id != student.vocab_id:
                raise RecipeError(
                    f"{loss} compares what both say of the same tokens; the student's are {student.vocab_id} "
                    f"({student.vocab_size}), the teacher's {teacher.vocab_id} ({teacher.vocab_size})",
                    remedy="train both on the same tokens (stage 2), or use a loss on hidden states "
                    "(hidden_mse)",
                )


@dataclass(frozen=True)
class Progress:
    """How far a run has come with a loss.

    Both numbers count from the step at which the loss began (see ``start_below``), and neither changes when
    a run is resumed.

    Args:
        step: of the optimiser, from 1.
        num_steps: the most that there will be: with ``schedule: wsd``, where dev decides when a run ends,
            a bound that may be far beyond its end. So schedules go by a number of steps of the loss's own.
    """

    step: int
    num_steps: int

    def share(self, steps: int) -> float:
        """How much of a schedule over ``steps`` is done: 0 at the first step, 1 from the last on.

        A run of fewer steps does all of it.
        """
        last = min(steps, self.num_steps) - 1
        return 1.0 if last <= 0 else min(1.0, (self.step - 1) / last)


GivenTargets = Targets | Mapping[str, Targets]
"""What a loss is given: one teacher's targets, or those of all by name."""


class Loss(Protocol):
    """A loss term, built as ``cls(config, setup)``.

    May be an ``nn.Module`` with its own parameters (projections), which are trained too and
    not kept. Class attributes, all optional: ``supervised = True`` gives it labelled utterances
    only; ``num_views = 2`` asks for two differently augmented copies of each batch; ``all_teachers = True``
    gives it the targets of all teachers at once, a mapping from their names, where others are built once for
    each; ``per = "pairs"`` says that it counts all pairs of a batch's rows, each with itself too: of a batch
    twice as large they are four times as many. The object's attribute ``taps``, optional too, names the
    student's taps that it reads from ``out.taps``.

    A loss whose call has the keyword ``progress`` gets a :class:`Progress`. A method
    ``after_step(value: float, progress: Progress)``, optional, is told the term's total over its count after
    each optimiser step, the same on all processes. What it learns from that is kept in buffers, so that a run
    resumes.
    """

    Config: ClassVar[type[Options]]

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Targets needed of each teacher; empty for losses that need none."""

    def __call__(self, out: ModelOutput, targets: Any, batch: Batch) -> LossOutput:
        """The loss.

        Args:
            out: of the student.
            targets: :class:`Targets`, empty if it requires none; with ``all_teachers``, by teacher.
            batch: what the student heard.
        """


def call_loss(
    loss: Loss, out: ModelOutput, targets: GivenTargets, batch: Batch, progress: Progress
) -> LossOutput:
    """Call a loss with what it takes."""
    call = getattr(loss, "forward", loss.__call__)  # of a module, the call itself takes anything
    if "progress" in inspect.signature(call).parameters:
        return loss(out, targets, batch, progress=progress)  # type: ignore[call-arg]
    return loss(out, targets, batch)
