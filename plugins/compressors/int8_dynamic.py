"""8-bit linear layers; activations are quantised as they come, each frame with a scale of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import Problem
from kdrecipe.interfaces import CompressContext

from .integer_layers import QMAX, QMAX_REDUCED
from .quantising import LayerOptions, Quantiser, last_step


class Int8Dynamic(Quantiser):
    """Linear layers compute in integers; convolutions, LSTMs and embeddings are stored in 8 bits."""

    class Config(LayerOptions):
        """Options; the others are those of :class:`LayerOptions`.

        Args:
            reduce_range: 7 instead of 8 bits for the weights of linear layers, for x86 processors
                without VNNI (before 2019), whose 8-bit sums saturate; others lose precision by it.
        """

        reduce_range: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__("int8_dynamic", config, "int8")

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Quantise in place.

        Raises:
            KdrecipeError: the model has no linear layer (left) to quantise.
        """
        qmax = QMAX_REDUCED if self.config.reduce_range else QMAX
        self._layers.choose(model)
        self._layers.replace(model, lambda name, linear, kind: self._layers.rounded(linear, kind, qmax=qmax))
        self._report = self._layers.report(model)
        return model


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("int8_dynamic", Int8Dynamic)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """It has to be the last step."""
    return last_step(recipe, "int8_dynamic")
