"""Several processes that train one model (``torchrun``), or the only one.

Gradients are summed by hand after the backward passes of a step, not by
``DistributedDataParallel``: its mean over ranks is not our normalisation, and it expects the same
parameters to take part on every rank, while a rank without labelled utterances skips terms. What
is lost is the overlap of communication with the backward pass, little at the sizes trained here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


def local_device() -> torch.device:
    """The GPU of this process (``torchrun`` says which, in LOCAL_RANK); the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """This process among those that train together.

    Args:
        rank: its number, from 0.
        world_size: how many there are.
        device: where it computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_environment(cls, device: str | None = None) -> Workers:
        """What ``torchrun`` says (RANK, WORLD_SIZE, LOCAL_RANK), a lone process without it.

        Args:
            device: None takes :func:`local_device`.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        chosen = local_device() if device is None else torch.device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, world_size, chosen)

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and logs."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """``value`` summed over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over processes; one that is None here counts as zero if another has it."""
        if self.world_size == 1:
            return
        listed = list(parameters)
        present = torch.tensor([p.grad is not None for p in listed], dtype=torch.int32, device=self.device)
        used = [p for p, n in zip(listed, self.sum(present).tolist(), strict=True) if n > 0]
        if not used:
            return
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in used if p.grad is not None]
        flat = self.sum(torch.cat([g.reshape(-1) for g in grads]))
        for grad, summed in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Numbers by name summed over processes; a name may be absent from some of them."""
        if self.world_size == 1:
            return dict(numbers)
        gathered: list[dict[str, float]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(gathered, dict(numbers))
        names = dict.fromkeys(name for part in gathered for name in part)
        return {name: sum(part.get(name, 0.0) for part in gathered) for name in names}

    def agree_on(self, decision: bool) -> bool:
        """The first process's ``decision``, so that processes whose clocks differ do the same."""
        if self.world_size == 1:
            return decision
        value = torch.tensor(int(decision), device=self.device)
        dist.broadcast(value, src=0)
        return bool(value)

    def share_state(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()
