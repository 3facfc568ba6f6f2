"""Compressors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces.batches import Batch
from kdrecipe.interfaces.common import Options

if TYPE_CHECKING:
    from torch import nn


def _no_objective(model: nn.Module) -> Iterator[Batch]:
    raise KdrecipeError(
        "gradients are wanted of a system without losses",
        remedy="give it losses (compress: {losses: [...]}), or choose scores that need no gradients",
    )


def _no_dev(model: nn.Module) -> float:
    raise KdrecipeError("dev errors are wanted, and there is no dev data with transcripts")


@dataclass
class CompressContext:
    """What a compressor may use besides the model, which is on ``device`` and is to stay there.

    Args:
        calibration: batches of features from the calibration split, from the start at each call.
        seed: for anything drawn at random.
        device: where the model and all batches are, as torch names it (``cpu``, ``cuda:0``).
        gradients: ``for batch in context.gradients(model)``: training batches, from the start at each call,
            in evaluation mode; within the loop each parameter's ``.grad`` is that of the system's own
            objective on this batch alone (None where it has no part in it), and gone after it. Losses with
            weights of their own (projections, which are still random) take no part unless all have some.
            KdrecipeError if the system has no losses or nothing to learn from.
        evaluate: token errors per reference token on dev, by greedy search of the first head: 0 is perfect,
            above 1 is possible. KdrecipeError where there is no dev.
    """

    calibration: Callable[[], Iterable[Batch]]
    seed: int = 0
    device: str = "cpu"
    gradients: Callable[[nn.Module], Iterator[Batch]] = _no_objective
    evaluate: Callable[[nn.Module], float] = _no_dev


class Compressor(Protocol):
    """One step of compression, built as ``cls(config)``.

    ``apply`` may change the model in place. If ``num_epochs`` is above 0, training continues
    for that long with the parent's own losses and teachers, ``on_step`` being called after
    every optimiser step, then ``finish``. ``rebuild`` gives an untrained model the structure of a
    compressed one, so that its weights can be loaded from a bundle.

    Where that structure does not follow from the options alone (which channels were kept), a compressor
    has two more methods: ``state() -> dict``, JSON-like, asked after ``finish`` and kept in the bundle,
    and ``load_state(state)``, called before ``rebuild``.

    ``penalty(model, step, num_steps) -> Tensor``, optional, is added to the loss of optimiser step ``step``
    (say a Lagrangian of the size); parameters that the compressor gives the model train with it.

    A compressor that makes models smaller by an amount has a class attribute ``strength``, the name of the
    option that says how much: a share from 0 (nothing) to below 1. A ``budget`` is met by that option: the
    model is then compressed many times by ``apply`` and ``finish`` without any training in between, which
    must already give it its final shape and size.
    """

    Config: ClassVar[type[Options]]
    num_epochs: int

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Compress, or prepare for compression during training."""

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """After optimiser step ``step`` (1-based) of ``num_steps``."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Make it final; the result is what the bundle stores."""

    def rebuild(self, model: nn.Module) -> nn.Module:
        """The same structure as ``finish`` gave, weights arbitrary."""

    def report(self) -> dict[str, float]:
        """Numbers for the report (sparsity, share of int8 weights, ...)."""


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in floating point, with the same (rounded) weights.

    A compressor's layers with weights in another format must have ``to_float()``, which gives an
    equivalent module with float32 weights: what fp32 exports are made of.
    """
    import copy

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "to_float"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_float())
    return model
