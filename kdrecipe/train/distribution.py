"""Several processes that train one model (``torchrun``), or the only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from kdrecipe.errors import KdrecipeError


def local_device() -> torch.device:
    """The GPU of this process (``torchrun`` says which, in LOCAL_RANK); the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def is_first() -> bool:
    """Whether this process is the one that writes files and logs."""
    return int(os.environ.get("RANK", 0)) == 0


def is_several() -> bool:
    """Whether several processes train one model."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


_by_itself = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, this process trains by itself, whatever ``torchrun`` says."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


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

        Raises:
            KdrecipeError: there are fewer GPUs than processes, or torch has no NCCL.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if _by_itself:
            rank, world_size = 0, 1
        chosen = local_device() if device is None else torch.device(device)
        if chosen.type == "cuda":
            _check_gpu(chosen, world_size)
            torch.cuda.set_device(chosen)
        if world_size > 1 and not dist.is_initialized():
            _join("nccl" if chosen.type == "cuda" else "gloo")
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


def _join(backend: str) -> None:
    """Meet the other processes.

    ``torchrun`` keeps one store for all attempts, and in it a process would find the addresses of those that
    have died, so each attempt has its own part of it.
    """
    store, rank, world_size = next(rendezvous("env://"))  # type: ignore[no-untyped-call]
    attempt = f"kdrecipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size}"
    part = PrefixStore(attempt, store)
    dist.init_process_group(backend, store=part, rank=rank, world_size=world_size)


def _check_gpu(device: torch.device, world_size: int) -> None:
    number, gpus = device.index or 0, torch.cuda.device_count()
    if number >= gpus:
        raise KdrecipeError(
            f"process {number} of this machine finds no GPU of its own: there are {gpus}",
            remedy=f"start at most {gpus} processes per machine (--nproc {gpus})",
        )
    if world_size > 1 and not dist.is_nccl_available():
        raise KdrecipeError(
            "several GPUs need NCCL, and this torch was built without it",
            remedy="install torch from PyPI for Linux, or train on one GPU: no --nproc",
        )
