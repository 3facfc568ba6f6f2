"""Cuts units out of a model, which makes its tensors smaller: heads, channels, width, layers.

What belongs together is what architectures and heads declare (``unit_groups``); here it is looked up, counted
and cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Part, UnitGroup

ENCODER = "encoder"


def unit_groups(model: nn.Module, parts: Sequence[str] = (ENCODER,)) -> list[UnitGroup]:
    """The groups of a recogniser, as it is now; paths count from the model.

    Args:
        model: with ``encoder`` and ``heads``.
        parts: ``encoder``, and names of heads.

    Raises:
        KdrecipeError: a part is missing, is quantised, or does not say what may be cut.
    """
    heads: Any = dict(model.get_submodule("heads").named_children())
    found: list[UnitGroup] = []
    for part in parts:
        path = ENCODER if part == ENCODER else f"heads.{part}"
        if part != ENCODER and part not in heads:
            raise KdrecipeError(
                f"the model has no head {part!r} to prune",
                remedy=f"its parts: {', '.join((ENCODER, *heads))}",
            )
        owner: Any = model.get_submodule(path)
        if not hasattr(owner, "unit_groups"):
            raise KdrecipeError(
                f"{type(owner).__name__} does not say what may be cut out of it",
                where=path,
                remedy="give the class a method unit_groups(), see docs/hooks.md, or choose other parts",
            )
        if quantised := [layer for layer in owner.modules() if hasattr(layer, "number_format")]:
            raise _uncuttable(quantised[0])
        found += [_with_readers(group.below(path), heads) for group in owner.unit_groups()]
    return [group for group in found if any(part.side == "in" for part in group.parts)]


def _with_readers(group: UnitGroup, heads: Mapping[str, Any]) -> UnitGroup:
    """The encoder's output is read by the heads; a head that does not say where can't do with less."""
    if group.output is None:
        return group
    if not all(hasattr(head, "reads") for head in heads.values()):
        return UnitGroup(group.name, group.kind, group.size, ())
    read = [f"heads.{name}.{layer}" for name, head in heads.items() for layer in head.reads()]
    parts = tuple(Part(layer, "in", group.output) for layer in read)
    return UnitGroup(group.name, group.kind, group.size, (*group.parts, *parts), group.output)


def read_at(model: nn.Module, group: UnitGroup) -> Iterator[tuple[Part, nn.Module]]:
    """Where a group's units are read: without what is read there, a unit is as good as gone."""
    for part in group.parts:
        if part.side == "in":
            yield part, model.get_submodule(part.layer)


def positions(part: Part, size: int, units: Tensor) -> Tensor:
    """Where ``units`` of a group of ``size`` stand on this side of the layer, in its order."""
    found, start = [], 0
    for block in part.blocks:
        at = start + units[:, None] * block + torch.arange(block)
        found.append(at.flatten())
        start += size * block
    return torch.cat(found)


def per_unit(part: Part, size: int, values: Tensor) -> Tensor:
    """(size,) sums of ``values`` along this side of the layer, unit by unit."""
    blocks = torch.split(values, [size * block for block in part.blocks])
    return torch.stack([x.unflatten(0, (size, -1)).sum(1) for x in blocks]).sum(0)


def to_positions(part: Part, values: Tensor) -> Tensor:
    """The value of each unit wherever it stands on this side of the layer; inverse of :func:`positions`."""
    return torch.cat([values.repeat_interleave(block) for block in part.blocks])


@torch.no_grad()
def cut(model: nn.Module, group: UnitGroup, keep: Tensor) -> None:
    """Keep the units ``keep`` (int64, rising) of a group, in place.

    Raises:
        KdrecipeError: a layer of the group is of a kind that can't be cut.
    """
    for part in group.parts:
        _cut(model.get_submodule(part.layer), part, positions(part, group.size, keep))
    if group.output is not None:
        encoder: Any = model.get_submodule(ENCODER)
        encoder.output_dim = len(keep) * sum(group.output)


def drop_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Keep these layers of the encoder; KdrecipeError if it does not say where its layers are."""
    layers = layers_of(model)
    encoder: Any = model.get_submodule(ENCODER)
    setattr(encoder, encoder.layer_list, nn.ModuleList(layers[i] for i in keep))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The equal layers of the encoder."""
    encoder: Any = model.get_submodule(ENCODER)
    if not hasattr(encoder, "layer_list"):
        raise KdrecipeError(
            f"{type(encoder).__name__} does not say which layers may be left out",
            where=ENCODER,
            remedy="give the class an attribute layer_list, see docs/hooks.md",
        )
    layers: nn.ModuleList = getattr(encoder, encoder.layer_list)
    return layers


class Sizes:
    """Number of parameters of a model after cuts, without cutting.

    Args:
        model: as it is.
        groups: of it.
        parts: paths of the modules that are counted.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup], parts: Sequence[str]) -> None:
        self.groups = groups
        layers = {part.layer: model.get_submodule(part.layer) for group in groups for part in group.parts}
        counted = {n: m for n, m in layers.items() if any(n.startswith(f"{part}.") for part in parts)}
        self._shapes = {name: _shape(module) for name, module in counted.items()}
        every = sum(p.numel() for part in parts for p in model.get_submodule(part).parameters())
        self.fixed = every - sum(count(*size) for size, count in self._shapes.values())

    def __call__(self, kept: Sequence[Any]) -> Any:
        """With so many units left of each group; whole numbers, or tensors for an expectation."""
        sizes = {
            name: dict(zip(("out", "in"), size, strict=True)) for name, (size, _) in self._shapes.items()
        }
        for group, number in zip(self.groups, kept, strict=True):
            for part in group.parts:
                if part.layer in sizes:
                    sizes[part.layer][part.side] -= (group.size - number) * sum(part.blocks)
        left = (self._shapes[name][1](size["out"], size["in"]) for name, size in sizes.items())
        return self.fixed + sum(left)


_Count = Callable[[int, int], int]


def _shape(layer: nn.Module) -> tuple[tuple[int, int], _Count]:
    """What a layer writes and reads, and its number of parameters as a function of these."""
    bias = int(getattr(layer, "bias", None) is not None)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features), lambda o, i: o * (i + bias)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        taps = prod(layer.kernel_size)
        if _is_depthwise(layer):
            return (layer.out_channels, 0), lambda o, i: o * (taps + bias)
        return (layer.out_channels, layer.in_channels), lambda o, i: o * (i * taps + bias)
    if isinstance(layer, nn.LayerNorm):
        return (layer.normalized_shape[0], 0), lambda o, i: o * (1 + bias)
    if isinstance(layer, nn.Embedding):
        return (layer.embedding_dim, 0), lambda o, i: o * layer.num_embeddings
    if isinstance(layer, nn.LSTM) and layer.num_layers == 1 and not layer.bidirectional:
        return (layer.hidden_size, layer.input_size), lambda o, i: 4 * o * (o + i + 2 * int(layer.bias))
    raise _uncuttable(layer)


def _uncuttable(layer: nn.Module) -> KdrecipeError:
    return KdrecipeError(
        f"a layer of the kind {type(layer).__name__} can't be cut",
        remedy="prune a float system first, and give steps that change its layers (int8, low_rank) after it",
    )


def _is_depthwise(conv: nn.Conv1d | nn.Conv2d) -> bool:
    return conv.groups == conv.out_channels == conv.in_channels and conv.groups > 1


def _cut(layer: Any, part: Part, at: Tensor) -> None:
    """Keep the positions ``at`` of one side of a layer."""
    _shape(layer)  # or refuse
    at = at.to(next(layer.parameters()).device)
    if isinstance(layer, nn.LSTM):
        _cut_lstm(layer, part.side, at)
    elif part.side == "in":
        _keep(layer, "weight", 1, at)
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(at))
    elif isinstance(layer, nn.Embedding):
        _keep(layer, "weight", 1, at)
        layer.embedding_dim = len(at)
    else:
        _keep_rows(layer, at)


def _keep_rows(layer: Any, at: Tensor) -> None:
    depthwise = not isinstance(layer, nn.Linear | nn.LayerNorm) and _is_depthwise(layer)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            _keep(layer, name, 0, at)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(at)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(at),)
    else:
        layer.out_channels = len(at)
        if depthwise:
            layer.in_channels = layer.groups = len(at)


def _cut_lstm(lstm: nn.LSTM, side: str, at: Tensor) -> None:
    if side == "in":
        _keep(lstm, "weight_ih_l0", 1, at)
        lstm.input_size = len(at)
        return
    gates = (torch.arange(4, device=at.device)[:, None] * lstm.hidden_size + at).flatten()
    for name, _ in list(lstm.named_parameters()):
        _keep(lstm, name, 0, gates)
    _keep(lstm, "weight_hh_l0", 1, at)
    lstm.hidden_size = len(at)
    lstm.flatten_parameters()


def _keep(layer: nn.Module, name: str, dim: int, at: Tensor) -> None:
    """A parameter with some of its rows or columns, in the memory layout that it had."""
    old: Any = getattr(layer, name)
    new = old.detach().index_select(dim, at)
    if new.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
