"""What quantising compressors share: which layers become what, and how a bundle keeps that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from kdrecipe.errors import KdrecipeError, Problem
from kdrecipe.interfaces import Options

from .integer_layers import Int4Linear, Int8Linear, StaticInt8Linear
from .stored_layers import StoredConv, StoredEmbedding, StoredLstm

STORED = "stored"
LINEARS: Mapping[str, Any] = {"int8": Int8Linear, "int8_static": StaticInt8Linear, "int4": Int4Linear}
STORES: Mapping[type, Any] = {
    nn.Conv1d: StoredConv,
    nn.Conv2d: StoredConv,
    nn.Embedding: StoredEmbedding,
    nn.LSTM: StoredLstm,
}
INTEGERS = (Int8Linear, Int4Linear, *STORES.values())


class LayerOptions(Options):
    """Options of every quantising compressor.

    Args:
        output_layer: quantise the heads as well.
        others: how the weights of convolutions, LSTMs and embeddings are stored, ``int8`` or ``float32``;
            they compute in float32 either way.
        layers: pattern of layers' names (``encoder.layers.0.*``) -> ``float``, ``int8`` or ``int4``, in place
            of what they would become; the first pattern that fits counts.
        group: of ``int4``: so many inputs share a scale.
    """

    output_layer: bool = True
    others: Literal["int8", "float32"] = "int8"
    layers: dict[str, Literal["float", "int8", "int4"]] = Field(default_factory=dict)
    group: Literal[16, 32, 64, 128, 256] = 32


class Layers:
    """The layers that a compressor quantises.

    Args:
        compressor: its name, for messages.
        options: what a recipe says.
        linear: what linear layers become, a key of :data:`LINEARS`.
    """

    def __init__(self, compressor: str, options: LayerOptions, linear: str) -> None:
        self.compressor, self.options, self.linear = compressor, options, linear
        self.kinds: dict[str, str] = {}

    def choose(self, model: nn.Module) -> None:
        """Decide what each layer becomes: ``kinds``, name -> a key of :data:`LINEARS` or ``stored``.

        Raises:
            KdrecipeError: no linear layer is left to quantise, or a pattern of ``layers`` fits none.
        """
        found = {name: module for name, module in model.named_modules() if _is_layer(module)}
        unused = [p for p in self.options.layers if not any(fnmatchcase(name, p) for name in found)]
        if unused:
            near = difflib.get_close_matches(unused[0], found, 3, 0.0)
            raise KdrecipeError(
                f"{self.compressor}: layers: no layer is called {unused[0]!r}",
                remedy=f"names are such as {', '.join(near)}" if near else "the model has none to quantise",
            )
        chosen = {name: self._kind(name, module) for name, module in found.items()}
        self.kinds = {name: kind for name, kind in chosen.items() if kind != "float"}
        if not set(self.kinds.values()) - {STORED}:
            done = any(isinstance(module, INTEGERS) for module in model.modules())
            raise KdrecipeError(
                f"{self.compressor} finds no linear layer in the model"
                + (": they are quantised already" if done else ""),
                remedy="compress a float system, and quantise once, as the last step",
            )

    def _kind(self, name: str, module: nn.Module) -> str:
        asked = next((kind for p, kind in self.options.layers.items() if fnmatchcase(name, p)), None)
        is_linear = type(module) is nn.Linear
        if asked is None:
            if not self.options.output_layer and name.startswith("heads."):
                return "float"
            return self.linear if is_linear else STORED if self.options.others == "int8" else "float"
        if not is_linear:
            return "float" if asked == "float" else STORED  # in 8 bits: 4 would hurt and win little
        return self.linear if asked == "int8" and self.linear.startswith("int8") else asked

    def replace(self, model: nn.Module, make: Callable[[str, nn.Linear, str], nn.Module]) -> None:
        """Put ``make(name, layer, kind)`` in the place of linear layers, stored ones in that of others."""
        for name, kind in self.kinds.items():
            module = model.get_submodule(name)
            if kind == STORED:
                set_submodule(model, name, STORES[type(module)].from_float(module))
            else:
                set_submodule(model, name, make(name, module, kind))  # type: ignore[arg-type]

    def rounded(self, linear: nn.Linear, kind: str, *, qmax: int = 127) -> nn.Module:
        """A layer of a kind that needs no calibration."""
        if kind == "int4":
            return Int4Linear.from_linear(linear, group=self.options.group)
        return Int8Linear.from_linear(linear, qmax=qmax)

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Empty layers where :meth:`replace` put filled ones."""
        for name, kind in self.kinds.items():
            module = model.get_submodule(name)
            cls = STORES[type(module)] if kind == STORED else LINEARS[kind]
            more = {"group": self.options.group} if kind == "int4" else {}
            set_submodule(model, name, cls.like(module, **more))
        return model

    def state(self) -> dict[str, Any]:
        """What a bundle keeps."""
        return {"layers": self.kinds}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state` gave."""
        self.kinds = dict(state["layers"])

    def report(self, model: nn.Module) -> dict[str, float]:
        """``int8_layers`` and ``int8_share`` (the part of all parameters), the same of ``int4``, and
        ``times_smaller``: bytes of the quantised layers' weights in float32 against now, scales included."""
        total = sum(p.numel() for p in model.parameters())
        found: dict[str, float] = {}
        before = now = 0.0
        layers = [model.get_submodule(name) for name in self.kinds]
        for bits in (8, 4):
            of_these = [m for m in layers if isinstance(m, Int4Linear) == (bits == 4)]
            integers = sum(p.numel() for m in of_these for p in m.parameters() if p.dtype == torch.int8)
            scales = sum(b.numel() for m in of_these for name, b in m.named_buffers() if "scale_" in name)
            before += 4 * integers
            now += integers * bits / 8 + 4 * scales
            if of_these:
                found |= {f"int{bits}_layers": float(len(of_these)), f"int{bits}_share": integers / total}
        return {**found, "times_smaller": before / now}


class Quantiser:
    """A compressor that makes integers of layers; a subclass has ``apply``, which fills ``_report``, too.

    Args:
        name: of the compressor.
        config: its options.
        linear: what linear layers become, a key of :data:`LINEARS`.
    """

    num_epochs = 0

    def __init__(self, name: str, config: LayerOptions, linear: str) -> None:
        self._layers = Layers(name, config, linear)
        self._report: dict[str, float] = {}

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Nothing: it needs no training."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Nothing: ``apply`` did it."""
        return model

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Put empty layers where filled ones were put."""
        return self._layers.rebuild(model)

    def state(self) -> dict[str, Any]:
        """What each layer became."""
        return self._layers.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """For :meth:`rebuild`."""
        self._layers.load_state(state)

    def report(self) -> dict[str, float]:
        """See :meth:`Layers.report`."""
        return self._report


def _is_layer(module: nn.Module) -> bool:
    # Only the classes themselves: a subclass is one because something reads its weights directly.
    if isinstance(module, nn.LSTM) and not StoredLstm.suits(module):
        return False
    return type(module) is nn.Linear or type(module) in STORES


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place that ``name`` names."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def last_step(recipe: Any, compressor: str) -> list[Problem]:
    """Integers can't be trained, pruned or quantised any more: ``compressor`` has to be the last step."""
    return [
        Problem(
            f"{step.name} comes after {compressor}",
            recipe.document.where(("systems", system.name, "compress", "steps", number)),
            f"give {compressor} last",
        )
        for system in recipe.systems.values()
        for number, step in enumerate(system.steps)
        if compressor in [earlier.name for earlier in system.steps[:number]]
    ]
