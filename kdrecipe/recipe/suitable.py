"""Which decoders and exporters suit a system: a matter of the heads of its model.

A system is judged by its first head: its row of the table shows that head's first decoder, as the
runtime of that head's export does it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Runtime
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.description import faults
from kdrecipe.recipe.sections import Named, System


def lineage(systems: Mapping[str, System], name: str) -> list[System]:
    """A system and what it was compressed from, one after the other; it ends where a parent is wrong."""
    found: list[System] = []
    system = systems.get(name)
    while system is not None and system not in found:
        found.append(system)
        system = systems.get(system.parent or "")
    return found


def origin_of(systems: Mapping[str, System], name: str) -> System | None:
    """The system that a compressed one stems from, any other itself; None where a parent is wrong."""
    found = lineage(systems, name)
    return found[-1] if found and found[-1].parent is None else None


def objective_of(systems: Mapping[str, System], name: str) -> System | None:
    """The next of its lineage with losses: with its losses, teachers and data a system trains."""
    return next((system for system in lineage(systems, name) if system.learns), None)


def model_of(systems: Mapping[str, System], name: str) -> dict[str, Any] | None:
    """The description of a system's model; that of a compressed system is its parent's.

    None where that can't be known: a pretrained bundle is not there yet, a parent is wrong.
    """
    system = origin_of(systems, name)
    if system is None:
        return None
    return bundle_model(system) if system.kind == "pretrained" else system.model


def heads_of(systems: Mapping[str, System], name: str) -> tuple[str, ...] | None:
    """Heads of a system's model, in order; none of what a plugin imports; None as of :func:`model_of`."""
    origin = origin_of(systems, name)
    if origin is not None and origin.is_imported:
        return ()
    model = model_of(systems, name)
    return tuple(model["heads"]) if model and model["heads"] else None


def bundle_meta(system: System) -> dict[str, Any] | None:
    """The description of a pretrained bundle, None if that can't be read yet."""
    try:
        path = system.bundle
        if path is None or not (path / "bundle.json").is_file():
            return None
        meta = json.loads(Path(path / "bundle.json").read_text(encoding="utf-8"))
    except (KdrecipeError, OSError, ValueError):
        return None  # stage 3 imports it, and reports what is wrong
    return meta if isinstance(meta, dict) and not faults(meta, absent=False) else None


def bundle_model(system: System) -> dict[str, Any] | None:
    """The model's description within a pretrained bundle, None if that can't be read yet."""
    model = (bundle_meta(system) or {}).get("model")
    return model if isinstance(model, dict) and {"name", "heads"} <= set(model) else None


def head_of(registry: Registry, kind: str, name: str) -> str | None:
    """The head that a decoder or an exporter is for."""
    head: str | None = getattr(registry.get(kind, name), "head", None)
    return head


def searches(heads: Sequence[str], decoders: Mapping[str, Named], registry: Registry) -> dict[str, Named]:
    """The decoders that serve a model with ``heads``, by label, its main search first.

    The main search is the first decoder of the first head; empty if there is none of that head.
    """
    fitting = {label: d for label, d in decoders.items() if head_of(registry, "decoders", d.name) in heads}
    main = [x for x, d in fitting.items() if head_of(registry, "decoders", d.name) == heads[0]][:1]
    return {label: fitting[label] for label in dict.fromkeys([*main, *fitting])} if main else {}


def exporters_for(
    model: Mapping[str, Any], exporters: Sequence[Named], registry: Registry
) -> tuple[Named, ...]:
    """The exporters of a head that ``model`` (its description) has, and that can take it."""
    return tuple(
        e
        for e in exporters
        if head_of(registry, "exporters", e.name) in model["heads"] and unfit(registry, e.name, model) is None
    )


def unfit(registry: Registry, exporter: str, model: Mapping[str, Any]) -> str | None:
    """Why an exporter can't take a model of its head; None if it can."""
    cls = registry.get("exporters", exporter)
    why: str | None = cls.unfit(model) if hasattr(cls, "unfit") else None
    return why


def measured_exporter(
    heads: Sequence[str], exporters: Sequence[Named], registry: Registry, search: Named | None = None
) -> Named | None:
    """The exporter whose files are measured: of the first head, the first one whose runtime has ``search``.

    Without it, the first one that has a runtime.
    """
    fitting = []
    for exporter in exporters:
        cls = registry.get("exporters", exporter.name)
        if head_of(registry, "exporters", exporter.name) == heads[0] and getattr(cls, "runtime", None):
            fitting.append((exporter, cls.runtime))
    if search is not None and len(fitting) > 1:
        for exporter, runtime in fitting:
            if isinstance(runtime_search(runtime, search, registry), RuntimeOptions):
                return exporter
    return fitting[0][0] if fitting else None


def search_of_row(heads: Sequence[str], decoders: Mapping[str, Named], registry: Registry) -> Named | None:
    """The search of a system's row; None: nothing searches its first head."""
    return next(iter(searches(heads, decoders, registry).values()), None)


@dataclass(frozen=True)
class RuntimeOptions:
    """A search in a runtime: the runtime's own name of it, and the options that it takes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def default_search(runtime: Runtime) -> RuntimeOptions:
    """The first search of a runtime, with its own options."""
    return RuntimeOptions(next(iter(runtime.searches.values())).name)


def runtime_search(runtime: Runtime, decoder: Named, registry: Registry) -> RuntimeOptions | str:
    """The search of ``decoder`` in ``runtime``, or why the runtime does not have it."""
    found = runtime.searches.get(decoder.name)
    if found is None:
        return f"{runtime.name} has no search {decoder.name}"
    config = registry.get("decoders", decoder.name).Config
    chosen = config.model_validate(decoder.options)
    for name, about in config.model_fields.items():
        value = getattr(chosen, name)
        if name not in found.options and value != about.get_default(call_default_factory=True):
            return f"the {found.name} of {runtime.name} has no {name}, here {value}"
    return RuntimeOptions(found.name, {name: getattr(chosen, name) for name in found.options})
