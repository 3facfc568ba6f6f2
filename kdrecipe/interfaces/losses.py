"""Loss terms."""

from __future__ import annotations

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
        total: scalar, the *sum* over valid frames, tokens or utterances.
        count: how many of those there were (0 is allowed: total must then be 0).
        metrics: extra numbers to log, sums as well (the loop divides them by count).
    """

    total: Tensor
    count: Tensor | int
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSetup:
    """The pair of models a loss works between; ``teacher`` is None without one."""

    student: ModelInfo
    teacher: ModelInfo | None = None

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


class Loss(Protocol):
    """A loss term, built as ``cls(config, setup)``.

    May be an ``nn.Module`` with its own parameters (projections), which are trained too and
    not kept. Class attributes, both optional: ``supervised = True`` gives it labelled utterances
    only; ``num_views = 2`` asks for two differently augmented copies of each batch. The object's
    attribute ``taps``, optional too, names the student's taps that it reads from ``out.taps``.
    """

    Config: ClassVar[type[Options]]

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Targets needed of each teacher; empty for losses that need none."""

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """The loss; ``targets`` is empty if it requires none."""
