"""What a recipe says that determines a training run; read while planning, so without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces import TargetSpec
from kdrecipe.recipe.sections import ALL, NONE
from kdrecipe.recipe.suitable import bundle_meta

if TYPE_CHECKING:
    from kdrecipe.data.stored_cuts import Chosen, StoredCuts
    from kdrecipe.jobs.plan import Plan
    from kdrecipe.recipe.load import Recipe, System


def needs_of(recipe: Recipe, system: System, teacher: str) -> list[TargetSpec]:
    """What the losses of ``system`` ask of ``teacher``, each target once."""
    needs: list[TargetSpec] = []
    for term in system.terms:
        cls = recipe.plugins.registry.get("losses", term.name)
        if term.teacher in (None, teacher) and hasattr(cls, "requires"):
            needs += cls.requires(cls.Config.model_validate(term.options))
    return merge_specs(needs)


def students_of(recipe: Recipe, teacher: str) -> list[System]:
    """The systems that learn from ``teacher``."""
    return [s for s in recipe.systems.values() if teacher in s.teachers and needs_of(recipe, s, teacher)]


def cached_for(recipe: Recipe, teacher: str) -> list[System]:
    """Those of them whose targets come from the cache."""
    return [system for system in students_of(recipe, teacher) if recipe.caches(teacher, system)]


def all_needs(recipe: Recipe, teacher: str, students: Sequence[System]) -> list[TargetSpec]:
    """What ``students`` together ask of ``teacher``."""
    return merge_specs(need for system in students for need in needs_of(recipe, system, teacher))


def utterances_of(
    system: System, cuts: StoredCuts, subsets: Mapping[str, Collection[str]], left_out: Collection[str]
) -> tuple[Chosen, Chosen]:
    """Ids of the training cuts that ``system`` learns from: those with their labels, those without.

    Args:
        system: trained or distilled.
        cuts: of the training split, perturbed copies included.
        subsets: name -> ids of the subset's utterances.
        left_out: cuts that are too short for their text; they serve where the text is not used.
    """

    def named(name: str | None) -> Chosen:
        return cuts.all() if name in (ALL, None) else cuts.chosen(() if name == NONE else subsets[str(name)])

    labelled: Chosen = named(system.data) - cuts.chosen(left_out)
    unlabelled: Chosen = named(NONE if system.unlabelled is None else system.unlabelled) - labelled
    return labelled, unlabelled


def needs_of_training(plan: Plan, recipe: Recipe, system: System, seed: int) -> tuple[str, ...]:
    """Jobs whose results a training run of ``system`` reads."""
    from kdrecipe.stages.codebooks import jobs_of

    needs = ["features", "tokens"]
    for teacher in system.teachers:
        name = f"{teacher}/seed{recipe.seed_of(teacher, seed)}"
        needs.append(f"targets/{name}" if f"targets/{name}" in plan.jobs else name)
        if needs[-1] != name:
            needs.append(name)
        needs += jobs_of(plan, [(teacher, recipe.seed_of(teacher, seed))])
    if system.labels:
        needs.append(f"hypotheses/{system.labels}/seed{recipe.seed_of(system.labels, seed)}")
    if system.init_from:
        needs.append(f"{system.init_from}/seed{recipe.seed_of(system.init_from, seed)}")
    return tuple(needs)


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
                for name in ("dim", "frame_shift_s", "vocab_id", "align")
            }
            spec = replace(spec, top_k=wide, dtype=fine, **known)
        merged[spec.key] = spec
    return list(merged.values())


def model_plugins(recipe: Recipe, name: str) -> dict[str, str]:
    """Fingerprints of the plugins that a system's model consists of.

    They are inputs of whatever runs it: their code may change what the same weights compute.
    """
    registry, system, used = recipe.plugins.registry, recipe.systems[name], []
    while system.parent is not None:
        used += [("compressors", step.name) for step in system.steps]
        system = recipe.systems[system.parent]
    meta = bundle_meta(system) if system.kind == "pretrained" else None
    used += [("compressors", step["name"]) for step in (meta or {}).get("compression", ())]
    if model := recipe.model_of(name):
        used += [("architectures", model["name"]), *(("heads", head) for head in model["heads"])]
    known = [(kind, plugin) for kind, plugin in used if registry.problem(kind, plugin) is None]
    return {f"{kind}/{plugin}": registry.fingerprint(kind, plugin) for kind, plugin in known}


def system_inputs(recipe: Recipe, system: System) -> Mapping[str, Any]:
    """What determines a trained system's weights, besides data, tokens and teachers."""
    registry = recipe.plugins.registry
    plugins: dict[str, Any] = {}
    if optimisers := recipe.plugins.fingerprints("build_optimizer"):
        plugins["build_optimizer"] = optimisers
    for name in (system.name, *system.needs):
        plugins |= model_plugins(recipe, name)
    for term in system.terms:
        plugins[f"losses/{term.name}"] = registry.fingerprint("losses", term.name)
    return {
        "model": system.model,
        "data": system.data,
        "unlabelled": system.unlabelled,
        "labels": system.labels,
        "keep": system.keep.model_dump(mode="json") if system.keep else None,
        "teachers": list(system.teachers),
        **({"view": system.targets.view} if system.targets.view != "clean" else {}),
        **({"ema": system.ema.model_dump(mode="json")} if system.ema else {}),
        "init_from": system.init_from,
        **({"init_layers": dict(system.init_layers)} if system.init_layers else {}),
        "losses": [
            {
                "name": t.name,
                "weight": t.weight,
                "teacher": t.teacher,
                "start_below": t.start_below,
                **t.options,
            }
            for t in system.terms
        ],
        "training": system.training.model_dump(mode="json"),
        "plugins": plugins,
    }
