"""What a recipe says that determines a training run; read while planning, so without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces import TargetSpec

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe, System


def needs_of(recipe: Recipe, system: System, teacher: str) -> list[TargetSpec]:
    """What the losses of ``system`` ask of ``teacher``, each target once."""
    needs: list[TargetSpec] = []
    for term in system.terms:
        cls = recipe.plugins.registry.get("losses", term.name)
        if term.teacher in (None, teacher) and hasattr(cls, "requires"):
            needs += cls.requires(cls.Config.model_validate(term.options))
    return merge_specs(needs)


def all_needs(recipe: Recipe, teacher: str) -> list[TargetSpec]:
    """What all systems together ask of ``teacher``: what its cache must hold."""
    students = [system for system in recipe.systems.values() if teacher in system.teachers]
    return merge_specs(need for system in students for need in needs_of(recipe, system, teacher))


def merge_specs(specs: Iterable[TargetSpec]) -> list[TargetSpec]:
    """What serves all of several needs: each kind and tap once, the largest top k, the finer type.

    A loss that asked for fewer classes gets more, and narrows them (``data.frames.keep_top``).
    """
    merged: dict[str, TargetSpec] = {}
    for spec in specs:
        other = merged.get(spec.key)
        if other is not None:
            wide = None if spec.top_k is None or other.top_k is None else max(spec.top_k, other.top_k)
            fine = "float32" if "float32" in (spec.dtype, other.dtype) else spec.dtype
            known = {
                name: getattr(spec, name) if getattr(spec, name) is not None else getattr(other, name)
                for name in ("dim", "frame_shift_s", "vocab_id")
            }
            spec = replace(spec, top_k=wide, dtype=fine, **known)
        merged[spec.key] = spec
    return list(merged.values())


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
