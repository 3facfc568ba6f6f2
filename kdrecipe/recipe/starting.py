"""What a model can take over of another one (``init_from``), by the descriptions of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdrecipe.errors import Problem, did_you_mean
from kdrecipe.plugin.registry import Registry

ENCODER = "encoder"

Parts = dict[str, tuple[int, ...] | None]
"""Part of a model (``norm``, ``encoder``, ``heads.ctc``) -> the layers that it takes, in order; None: all."""


def shared_parts(
    registry: Registry,
    model: Mapping[str, Any],
    other: Mapping[str, Any],
    layers: Mapping[str, Sequence[int]],
) -> Parts:
    """The parts of ``model`` that ``other`` has, too: the encoder, and heads whose options agree.

    Heads with chosen layers are among them even if they are not the same size.
    """
    parts: Parts = {"norm": None, ENCODER: _chosen(layers, ENCODER)}
    for head in model["heads"]:
        if head in layers or (head in other["heads"] and not _differ(registry, model, other, head, ())):
            parts[f"heads.{head}"] = _chosen(layers, head)
    return parts


def misfits(
    registry: Registry,
    model: Mapping[str, Any],
    other: Mapping[str, Any],
    layers: Mapping[str, Sequence[int]],
) -> Iterator[Problem]:
    """Why ``model`` can't take over the encoder of ``other``, and the ``layers`` chosen of its parts.

    The remedy of each is for ``init_from`` of a recipe.

    Args:
        registry: of the plugins that both consist of.
        model: description of the one that is to be trained, as in a recipe.
        other: of the one whose weights it takes.
        layers: ``encoder`` or a head's name -> numbers of layers of ``other``, in the order of the model's.
    """
    if ENCODER not in layers and (differ := _differ(registry, model, other, ENCODER, ())):
        what = f"has another encoder ({', '.join(differ)}): its weights do not fit"
        remedy = "give both the same encoder; heads may differ"
        if differ == ["num_layers"]:
            remedy = "give both the same encoder, or choose layers: {system: ..., layers: {encoder: [0, 2]}}"
        yield Problem(what, "", remedy)
    for part, numbers in layers.items():
        yield from _layer_misfits(registry, model, other, part, numbers)


def _layer_misfits(
    registry: Registry, model: Mapping[str, Any], other: Mapping[str, Any], part: str, numbers: Sequence[int]
) -> Iterator[Problem]:
    for owner, lacking in ((model, "the model lacks"), (other, "lacks")):
        if part != ENCODER and part not in owner["heads"]:
            what = f"{lacking} the part {part!r} whose layers are chosen"
            yield Problem(what, "", did_you_mean(part, {ENCODER, *owner["heads"]}))
            return
    if getattr(_class(registry, model, part), "layer_list", None) is None:
        what = f"has no layers to choose from in {part}: the plugin says no layer_list"
        yield Problem(what, "", "leave it out: all of a part is taken over, or nothing")
        return
    if differ := _differ(registry, model, other, part, ("num_layers",)):
        what = f"has layers of another kind in {part} ({', '.join(differ)}): their weights do not fit"
        yield Problem(what, "", "give both the same options; num_layers may differ")
        return
    wanted, available = (int(_options(registry, m, part)["num_layers"]) for m in (model, other))
    if strange := [n for n in numbers if n >= available]:
        listed = ", ".join(map(str, strange))
        what = f"has {available} layers in {part}, and no {listed}: they count from 0"
        yield Problem(what, "", f"choose from 0 to {available - 1}")
    elif len(numbers) != wanted:
        what = f"gives {len(numbers)} layers to {part}, which has {wanted}"
        yield Problem(what, "", f"choose {wanted}, or set num_layers: {len(numbers)}")


def _chosen(layers: Mapping[str, Sequence[int]], part: str) -> tuple[int, ...] | None:
    return tuple(layers[part]) if part in layers else None


def _differ(
    registry: Registry, mine: Mapping[str, Any], its: Mapping[str, Any], part: str, free: Sequence[str]
) -> list[str]:
    """Options of a part that differ between two models and decide on its weights.

    A default that follows from other options (None) is not known here: the weights' shapes tell.
    """
    if part == ENCODER and mine["name"] != its["name"]:
        return ["name"]
    free = (*free, *getattr(_class(registry, mine, part), "free_options", ()))
    one, other = _options(registry, mine, part), _options(registry, its, part)
    return sorted(
        key
        for key in {**one, **other}
        if key not in free
        and one.get(key) != other.get(key)
        and None not in (one.get(key, 0), other.get(key, 0))
    )


def _class(registry: Registry, model: Mapping[str, Any], part: str) -> Any:
    return registry.get("architectures", model["name"]) if part == ENCODER else registry.get("heads", part)


def _options(registry: Registry, model: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The options of a part, defaults filled in: a description may be older than an option."""
    given = {k: v for k, v in model.items() if k not in ("name", "heads")}
    given = given if part == ENCODER else model["heads"][part] or {}
    fields = _class(registry, model, part).Config.model_fields
    return {
        k: f.get_default(call_default_factory=True) for k, f in fields.items() if not f.is_required()
    } | given
