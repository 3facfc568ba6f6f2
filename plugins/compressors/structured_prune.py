"""Cut out the units that are worth least: smaller tensors, fewer products, on any runtime.

Attention heads, feed-forward units, channels, the width of the stream between layers, whole layers: scored
once, cut at once, then fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError, Problem
from kdrecipe.interfaces import CompressContext, Options, UnitGroup, UnitKind
from kdrecipe.structure import ENCODER, Sizes, drop_layers, layers_of, unit_groups

from .choosing import cut_out, fitting, floors, part_paths, shaped
from .scores import Score, layer_influence, unit_scores

DEFAULT_KINDS: tuple[UnitKind, ...] = ("heads", "units", "channels")


class StructuredPrune:
    """One-shot structured pruning.

    Its state is how many units are left of each group: which ones is in the weights.
    """

    tiny_options: ClassVar[dict[str, Any]] = {"epochs": 1, "multiple_of": 1}
    contract_options: ClassVar[dict[str, Any]] = {"kinds": ["width"], "share": 0.4, "multiple_of": 1}
    strength: ClassVar[str] = "share"

    class Config(Options):
        """Options.

        Args:
            share: of the parameters of ``parts`` that goes, 0 to 1.
            kinds: what is cut: ``heads`` of attention, ``units`` of feed-forward modules and recurrences,
                ``channels`` of convolutions, ``width`` of the stream between layers.
            parts: ``encoder``, and heads by name.
            drop_layers: so many whole layers of the encoder go first, those that change their input least;
                they are part of the share.
            score: what a unit is worth: ``taylor`` (needs losses), ``activation`` (needs calibration data) or
                ``magnitude``.
            scope: ``global``: the least of all groups together; ``per_group``: the same share of each group.
            at_least: share of each group's units that stays.
            multiple_of: of a group that loses some, so many units or a multiple stay, heads excepted:
                processors take 8 or 16 numbers at once, and a width of 134 costs more time than one of 144.
            epochs: fine-tuning afterwards.
        """

        share: float = Field(default=0.5, ge=0.0, lt=1.0)
        kinds: tuple[UnitKind, ...] = DEFAULT_KINDS
        parts: tuple[str, ...] = Field(default=(ENCODER,), min_length=1)
        drop_layers: int = Field(default=0, ge=0)
        score: Score = "taylor"
        scope: Literal["global", "per_group"] = "global"
        at_least: float = Field(default=0.1, ge=0.0, le=1.0)
        multiple_of: int = Field(default=8, ge=1)
        epochs: int = Field(default=5, ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_epochs = config.epochs
        self._state: dict[str, Any] = {}
        self._report: dict[str, float] = {}

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Score, choose, cut.

        Raises:
            KdrecipeError: the model does not say what may be cut, or so much can't go.
        """
        paths = part_paths(self.config.parts)
        unit_groups(model, self.config.parts)  # or refuse
        before = Sizes(model, [], paths)([])
        kept_layers = self._kept_layers(model, context)
        if kept_layers:
            drop_layers(model, kept_layers)
        groups = self._groups(model)
        goal = math.ceil((1 - self.config.share) * before)
        keep = self._chosen(model, groups, paths, goal, context)
        left, kept = cut_out(model, groups, keep)
        self._state = {"layers": len(kept_layers), "units": left}
        params = Sizes(model, [], paths)([])
        layers = {"layers_kept": float(len(kept_layers))} if kept_layers else {}
        self._report = {"pruned_share": 1 - params / before, "params": float(params), **layers, **kept}
        return model

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """Nothing: what is gone is gone."""

    def finish(self, model: nn.Module) -> nn.Module:
        return model

    def state(self) -> dict[str, Any]:
        """How much is left: ``layers``, and ``units`` by group."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """For :meth:`rebuild`."""
        self._state = state

    def rebuild(self, model: nn.Module) -> nn.Module:
        """Cut as much, whichever units."""
        return shaped(model, self.config.parts, self._state)

    def report(self) -> dict[str, float]:
        """``pruned_share`` and ``params`` of the parts, and the share of each kind that is left."""
        return self._report

    def _groups(self, model: nn.Module) -> list[UnitGroup]:
        found = unit_groups(model, self.config.parts)
        groups = [group for group in found if group.kind in self.config.kinds]
        if not groups and not self.config.drop_layers:
            has = ", ".join(dict.fromkeys(group.kind for group in found)) or "nothing"
            raise KdrecipeError(
                f"structured_prune finds no {' or '.join(self.config.kinds) or 'kinds'} to cut in the model",
                remedy=f"kinds that it has: {has}; or drop_layers",
            )
        return groups

    def _kept_layers(self, model: nn.Module, context: CompressContext) -> list[int]:
        """Numbers of the layers that stay, in order; empty: all of them."""
        if not self.config.drop_layers:
            return []
        number = len(layers_of(model))
        if self.config.drop_layers >= number:
            raise KdrecipeError(
                f"drop_layers is {self.config.drop_layers}, the encoder has {number} layers",
                remedy=f"at most {number - 1}",
            )
        influence = layer_influence(model, context)
        order = sorted(range(number), key=lambda i: influence[i])
        return sorted(order[self.config.drop_layers :])

    def _chosen(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        paths: Sequence[str],
        goal: int,
        context: CompressContext,
    ) -> list[Tensor]:
        """The units of each group that stay."""
        sizes = Sizes(model, groups, paths)
        if not groups or sizes([group.size for group in groups]) <= goal:
            return [torch.arange(group.size) for group in groups]  # layers were enough, or all that there is
        scores = unit_scores(model, groups, self.config.score, context)
        least = floors(groups, self.config.at_least)
        return fitting(
            groups,
            scores,
            sizes,
            goal,
            least,
            scope=self.config.scope,
            by_cost=self.config.score == "taylor",
            multiple_of=self.config.multiple_of,
        )


@hookimpl
def register_compressors(register: Callable[[str, type], None]) -> None:
    register("structured_prune", StructuredPrune)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """Scores by gradients need losses."""
    return [
        Problem(
            "score: taylor needs losses, and a bundle that was made elsewhere holds none",
            recipe.document.where(("systems", system.name, "compress", "steps", number)),
            "add losses to the system, or score: activation",
        )
        for system in recipe.systems.values()
        for number, step in enumerate(system.steps)
        if step.name == "structured_prune" and step.options["score"] == "taylor"
        if recipe.objective_of(system.name) is None
    ]
