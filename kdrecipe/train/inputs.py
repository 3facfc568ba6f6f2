"""What a recipe says that determines a training run; read while planning, so without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces import TargetSpec

if TYPE_CHECKING:
    from kdrecipe.schema import Recipe, System


def needs_of(recipe: Recipe, system: System, teacher: str) -> list[TargetSpec]:
    """What the losses of ``system`` ask of ``teacher``, each target once (the widest top-k)."""
    found: dict[str, TargetSpec] = {}
    for term in system.terms:
        cls = recipe.plugins.registry.get("losses", term.name)
        if term.teacher not in (None, teacher) or not hasattr(cls, "requires"):
            continue
        for need in cls.requires(cls.Config.model_validate(term.options)):
            merge_need(found, need)
    return list(found.values())


def all_needs(recipe: Recipe, teacher: str) -> list[TargetSpec]:
    """What all systems together ask of ``teacher``: what its cache must hold."""
    found: dict[str, TargetSpec] = {}
    for system in recipe.systems.values():
        if teacher in system.teachers:
            for need in needs_of(recipe, system, teacher):
                merge_need(found, need)
    return list(found.values())


def merge_need(found: dict[str, TargetSpec], need: TargetSpec) -> None:
    """Add a need to those found; of two that differ in top-k the wider stays."""
    old = found.get(need.key)
    if old is None or (old.top_k is not None and (need.top_k is None or need.top_k > old.top_k)):
        found[need.key] = need


def system_inputs(recipe: Recipe, system: System) -> Mapping[str, Any]:
    """What determines a trained system's weights, besides data, tokens and teachers."""
    registry = recipe.plugins.registry
    plugins = {}
    if system.model:
        plugins[f"architectures/{system.model['name']}"] = registry.fingerprint(
            "architectures", system.model["name"]
        )
        for head in system.model["heads"]:
            plugins[f"heads/{head}"] = registry.fingerprint("heads", head)
    for term in system.terms:
        plugins[f"losses/{term.name}"] = registry.fingerprint("losses", term.name)
    return {
        "model": system.model,
        "data": system.data,
        "unlabelled": system.unlabelled,
        "teachers": list(system.teachers),
        "init_from": system.init_from,
        "losses": [
            {"name": t.name, "weight": t.weight, "teacher": t.teacher, **t.options} for t in system.terms
        ],
        "training": system.training.model_dump(mode="json"),
        "plugins": plugins,
    }
