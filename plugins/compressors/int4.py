"""4-bit weights of linear layers, in groups with a scale each; activations and sums stay in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import Problem
from kdrecipe.interfaces import CompressContext

from .quantising import LayerOptions, Quantiser, last_step


class Int4(Quantiser):
    """Linear layers have 4-bit weights; convolutions, LSTMs and embeddings are stored in 8 bits."""

    class Config(LayerOptions):
        """Options: those of :class:`LayerOptions`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__("int4", config, "int4")

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Quantise in place.

        Raises:
            KdrecipeError: the model has no linear layer (left) to quantise.
        """
        self._layers.choose(model)
        self._layers.replace(model, lambda name, linear, kind: self._layers.rounded(linear, kind))
        self._report = self._layers.report(model)
        return model


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("int4", Int4)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """It has to be the last step."""
    return last_step(recipe, "int4")
