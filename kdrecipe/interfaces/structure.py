"""What of a model may be cut out: units that go together, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

UnitKind = Literal["heads", "units", "channels", "width"]
"""Heads of attention; units of a feed-forward module or of a recurrence; channels of a convolution over time;
values of the stream that leads from layer to layer."""

UNIT_KINDS: tuple[UnitKind, ...] = get_args(UnitKind)


@dataclass(frozen=True)
class Part:
    """One side of a layer on which a group's units stand.

    Args:
        layer: path of the layer (``layers.0.attention.qkv``).
        side: ``out``: what it writes; also of a norm, of an embedding, and of a convolution within channels.
            ``in``: what it reads.
        blocks: the side is a row of blocks, and a block has so many values for each unit, one unit after the
            other: ``(1,)``: a value per unit; ``(8,)``: eight in a row; ``(8, 8, 8)``: so for queries, then
            for keys, then for values.
    """

    layer: str
    side: Literal["in", "out"]
    blocks: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class UnitGroup:
    """Units of which some may be cut out, each with all that belongs to it.

    Args:
        name: unique within its model, ``layers.0.attention``.
        kind: what they are.
        size: how many there are.
        parts: where they stand; at least one is read (``in``), unless the group is the encoder's output.
        output: blocks of the encoder's output, if its units are that: the heads read it.
    """

    name: str
    kind: UnitKind
    size: int
    parts: tuple[Part, ...]
    output: tuple[int, ...] | None = None

    def below(self, path: str) -> UnitGroup:
        """The same group, seen from a module that has its owner at ``path``."""
        parts = tuple(replace(part, layer=f"{path}.{part.layer}") for part in self.parts)
        return replace(self, name=f"{path}.{self.name}", parts=parts)
