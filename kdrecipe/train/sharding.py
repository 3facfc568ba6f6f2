"""Weights, gradients and optimiser state divided among processes: FSDP2, for models that do not fit.

Each layer of the encoder is one unit, everything else another: weights of a unit are gathered before they
are used, and gradients are summed and divided again as soon as they are there. Every process has to call
every unit equally often, so one with fewer batches computes one of the others' along, which counts nothing.

Imported only where it is used: FSDP's own import takes half a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kdrecipe.interfaces import LossOutput, ModelOutput

if TYPE_CHECKING:
    from kdrecipe.train.distribution import Workers
    from kdrecipe.train.step import Micro
    from kdrecipe.train.together import Forward


def shard(model: nn.Module, workers: Workers) -> None:
    """Divide ``model``, which all processes have whole and alike, in place."""
    for p in model.parameters():  # FSDP wants them so; convolutions may have channels last
        p.data = p.data.contiguous()
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))
    units = [layer for layers in _lists(model) for layer in layers if any(True for _ in layer.parameters())]
    for unit in (*units, model):
        part: Any = fully_shard(unit, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # totals were divided by the counts of the whole step
        part.set_force_sum_reduction_for_comms(True)


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers in the encoder."""
    encoder = getattr(module, "encoder", module)
    found: list[nn.ModuleList] = []
    for child in encoder.children():
        found += [child] if isinstance(child, nn.ModuleList) else _lists(child)
    return found


def rest(model: nn.Module) -> None:
    """Let go of gathered weights, after passes without a backward pass; the next one gathers them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Sharded:
    """As :class:`kdrecipe.train.together.Together`, for a model that is divided.

    Args:
        model: divided.
        losses: those that own parameters, which are whole in each process.
        forward: the pass of one process by itself, through both.
        workers: this process among all.
    """

    def __init__(self, model: nn.Module, losses: nn.Module, forward: Forward, workers: Workers) -> None:
        self._model, self._of, self._workers = model, forward, workers
        self._own = list(losses.parameters())

    def forward(self, micro: Micro, step: int) -> tuple[list[LossOutput], ModelOutput]:
        """As the ``forward`` given; every parameter of the model gets a gradient, if only of zero."""
        found, out = self._of(micro, step)
        # Those of the layers are divided again by now; they get theirs through the encoder's output.
        gathered = [p for p in self._model.parameters() if not isinstance(p, DTensor)]
        zero: Tensor = _Touch.apply(out.hidden_BTD, *gathered)  # type: ignore[no-untyped-call]
        return [replace(o, total=o.total + zero) for o in found], out

    def adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Nothing: each backward pass sums over processes, and what it finds is added up."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Sum the gradients of the losses' own parameters; None here is zero if another process has one."""
        if not self._own:
            return
        present = torch.tensor([p.grad is not None for p in self._own], dtype=torch.int32)
        for p, number in zip(self._own, self._workers.sum(present.to(self._workers.device)), strict=True):
            if number > 0:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self._workers.sum(p.grad)


class _Touch(torch.autograd.Function):
    """0, with a gradient of zeros for all inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]  # not the inputs: FSDP frees them
        return inputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


# ---------------------------------------------------------------- states, whole on disk


def whole(state: Any) -> Any:
    """A state dict whose divided tensors are gathered, on the CPU; all processes call it together."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    return state


def divided(state: Mapping[str, Tensor], like: Mapping[str, Any]) -> dict[str, Tensor]:
    """The other way round: each tensor as the one of the same name in ``like``."""
    return {name: _as(value, like[name]) for name, value in state.items()}


def divided_optimizer(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's whole state as its parameters are divided."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of = {
        number: {name: _as(value, parameters[number]) for name, value in its.items()}
        for number, its in state["state"].items()
    }
    return {**state, "state": of}


def _as(value: Any, like: Any) -> Any:
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def clip_sharded(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """As :func:`kdrecipe.train.optimisation.clip_gradients`, where some parameters are divided."""
    grads: list[Any] = [p.grad for p in parameters if p.grad is not None]
    kinds = [g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)]
    norms: list[Any] = [torch.nn.utils.get_total_norm(kind) for kind in kinds if kind]
    plain = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(plain))
    if max_norm:
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        for grad in grads:
            grad.mul_(factor)
    return norm
