"""Compressors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from kdrecipe.interfaces.batches import Batch
from kdrecipe.interfaces.common import Options

if TYPE_CHECKING:
    from torch import nn


@dataclass
class CompressContext:
    """What a compressor may use besides the model.

    Args:
        calibration: batches of features from the calibration split, from the start at each call.
        seed: for anything drawn at random.
    """

    calibration: Callable[[], Iterable[Batch]]
    seed: int = 0


class Compressor(Protocol):
    """One step of compression, built as ``cls(config)``.

    ``apply`` may change the model in place. If ``num_epochs`` is above 0, training continues
    for that long with the parent's own losses and teachers, ``on_step`` being called after
    every optimiser step, then ``finish``. ``rebuild`` gives an untrained model the structure of a
    compressed one, so that its weights can be loaded from a bundle.

    Where that structure does not follow from the options alone (which channels were kept), a compressor
    has two more methods: ``state() -> dict``, JSON-like, asked after ``finish`` and kept in the bundle,
    and ``load_state(state)``, called before ``rebuild``.
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
