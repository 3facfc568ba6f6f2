"""Gradients of several processes summed while the backward pass goes on.

``DistributedDataParallel`` sends each bucket of gradients as soon as it is complete. Its mean over
processes is not our normalisation, so a communication hook sums instead: totals were divided by the
counts of the whole step before. A parameter that this process's losses do not use adds zero; one that
no process uses has no gradient, as in a lone process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from kdrecipe.interfaces import LossOutput, ModelOutput

if TYPE_CHECKING:
    from kdrecipe.train.step import Micro

Forward = Callable[["Micro", int], tuple[list[LossOutput], ModelOutput]]
"""The terms of a micro-batch at a step, and the student's output."""


class Together:
    """Forward passes whose backward passes sum gradients over processes.

    Args:
        model: what is trained, the same on all processes.
        losses: those that own parameters.
        forward: the pass of one process by itself, through both.
    """

    def __init__(self, model: nn.Module, losses: nn.Module, forward: Forward) -> None:
        whole = _Whole(model, losses, forward)
        # Values are the same everywhere already, buffers included, and stay so.
        self._ddp = DistributedDataParallel(
            whole,
            broadcast_buffers=False,
            init_sync=False,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        # A lambda, since the annotations of a function must be types, not their names.
        self._ddp.register_comm_hook(None, lambda state, bucket: _sum(bucket))

    def forward(self, micro: Micro, step: int) -> tuple[list[LossOutput], ModelOutput]:
        """As the ``forward`` given; every total has a gradient, if only of zero."""
        kept: list[tuple[list[LossOutput], ModelOutput]] = []
        totals = self._ddp(micro, step, kept)
        [(found, out)] = kept
        return [replace(o, total=total) for o, total in zip(found, totals, strict=True)], out

    def nothing(self) -> Tensor:
        """A zero to call ``backward`` on where this process has no data and the others have."""
        zero: Tensor = self._ddp(None, 0, [])[0]
        return zero

    def finish(self) -> None:
        """Nothing is left to do after the last backward pass."""

    def adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass: gradients are added up here, and after the last one over
        processes."""
        return contextlib.nullcontext() if last else self._ddp.no_sync()


class _Whole(nn.Module):
    """Model and losses as one module, from a micro-batch to the losses' totals.

    ``anchor`` is 0 and no optimiser has it. It takes part in each total, so a process whose losses give no
    gradient has a backward pass all the same, which the others' need.
    """

    def __init__(self, model: nn.Module, losses: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.losses = model, losses
        device = next(model.parameters()).device
        self.anchor = nn.Parameter(torch.zeros((), device=device))
        self._of = forward

    def forward(self, micro: Micro | None, step: int, kept: list[Any]) -> list[Tensor]:
        if micro is None:
            return [self.anchor + 0]
        found, out = self._of(micro, step)
        kept.append((found, out))
        # Only totals are given back: of other tensors, DDP would wait for gradients.
        return [o.total + self.anchor for o in found]


def _sum(bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return done
