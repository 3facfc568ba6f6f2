"""4-bit weights of linear layers, in groups with a scale each; activations and sums stay in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import Problem
from kdrecipe.interfaces import CompressContext

from .quantising import LayerOptions, Layers, last_step


class Int4:
    """Linear layers have 4-bit weights; convolutions, LSTMs and embeddings are stored in 8 bits."""

    num_epochs = 0

    class Config(LayerOptions):
        """Options: those of :class:`LayerOptions`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._layers = Layers("int4", config, "int4")
        self._report: dict[str, float] = {}

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Quantise in place.

        Raises:
            KdrecipeError: the model has no linear layer (left) to quantise.
        """
        self._layers.choose(model)
        self._layers.replace(model, lambda name, linear, kind: self._layers.rounded(linear, kind))
        self._report = self._layers.report(model)
        return model

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Nothing: it needs no training."""

    def finish(self, model: nn.Module) -> nn.Module:
        return model

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Put empty layers where ``apply`` puts filled ones."""
        return self._layers.rebuild(model)

    def state(self) -> dict[str, Any]:
        """What each layer became."""
        return self._layers.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._layers.load_state(state)

    def report(self) -> dict[str, float]:
        """See :meth:`Layers.report`."""
        return self._report


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("int4", Int4)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """It has to be the last step."""
    return last_step(recipe, "int4")
