"""A teacher that is the running average of the student's own weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdrecipe.interfaces import Batch, Targets, TargetSpec
from kdrecipe.targets.live import LiveTargets, ModelTeacher

if TYPE_CHECKING:
    from kdrecipe.model.asr import AsrModel


class MovingAverage:
    """``average = decay * average + (1 - decay) * student`` after each optimiser step, in float32.

    Kaizen (Manohar 2021, arXiv 2106.07759), which also finds that full precision is critical: in 8 bits of
    mantissa, the step of a thousandth that the average moves by is lost. Buffers are the student's own.

    Args:
        decay: between 0 and 1.
        specs: the targets that it gives.
    """

    hears_audio = False

    def __init__(self, decay: float, specs: Sequence[TargetSpec]) -> None:
        self.decay = decay
        self.specs = tuple(specs)
        self._student: nn.Module | None = None
        self._copy: Any = None
        self._live: LiveTargets | None = None

    def start(self, student: AsrModel) -> None:
        """Begin with the student's weights, on its device."""
        self._student = student
        self._copy = copy.deepcopy(student).float()
        self._live = LiveTargets(ModelTeacher(self._copy), self.specs)

    def targets(self, batch: Batch) -> Targets:
        """What the average says of ``batch``."""
        assert self._live is not None, "start() comes first"
        return self._live.targets(batch)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the student's weights after a step."""
        assert self._student is not None
        live = [p.detach().float() for p in self._student.parameters()]
        torch._foreach_lerp_(list(self._copy.parameters()), live, 1 - self.decay)
        for own, buffer in zip(self._copy.buffers(), self._student.buffers(), strict=True):
            own.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights."""
        state: dict[str, Tensor] = self._copy.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from :meth:`state_dict`."""
        self._copy.load_state_dict(state)
