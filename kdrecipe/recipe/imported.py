"""Teachers that plugins import: built from a system's options, cheaply, to be asked what they give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdrecipe.errors import KdrecipeError, PluginError, Problem, RecipeError
from kdrecipe.interfaces import Located, Teacher
from kdrecipe.plugin.loader import reason
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.sections import Location, System


def teacher_options(registry: Registry, system: System) -> dict[str, Any]:
    """A system's options for its teacher plugin, paths looked up.

    Raises:
        RecipeError: an environment variable is not set.
    """
    assert system.plugin is not None
    assert system.location is not None
    config: type[BaseModel] = registry.get("teachers", system.plugin.name).Config
    options = dict(system.plugin.options)
    for name, field in config.model_fields.items():
        if any(mark is Located for mark in field.metadata) and isinstance(options.get(name), str):
            options[name] = _located(options[name], system.location)
    return options


def _located(text: str, base: Location) -> str:
    path = replace(base, text=text).path()
    return str(path) if path.exists() else str(replace(base, text=text, base=Path()).path())


def tokenizer_file(teacher: Teacher) -> Path | None:
    """The file of a teacher's own byte-level BPE, whose tokens a recipe may take; None: it has none."""
    path: Path | None = getattr(teacher, "tokenizer_file", None)
    return path


def same_tokens(teacher: Teacher, other: Teacher) -> bool:
    """Whether both count their token posteriors in one list."""
    one, two = (
        {spec.vocab_id for spec in t.provides() if spec.kind == "token_logits"} for t in (teacher, other)
    )
    return bool(one & two)


def build_teacher(registry: Registry, system: System) -> Teacher:
    """The teacher that a system names, its weights not loaded.

    Raises:
        RecipeError: at the system's line of the recipe: an environment variable is not set, a file is
            missing, a package is not installed, an option does not suit the model.
        PluginError: the plugin fails in a way of its own.
    """
    options = teacher_options(registry, system)
    assert system.plugin is not None
    assert system.location is not None
    cls, where = registry.get("teachers", system.plugin.name), system.location.where
    try:
        teacher: Teacher = cls(cls.Config.model_validate(options))
    except KdrecipeError as error:
        raise RecipeError([p if p.where else replace(p, where=where) for p in error.problems]) from error
    except Exception as error:
        what = f"teacher {system.plugin.name!r} can't be opened: {reason(error)}"
        raise PluginError(what, where=where) from error
    return teacher


def unset_variables(registry: Registry, systems: Iterable[System]) -> list[Problem]:
    """Environment variables in the options of imported teachers that are not set, a problem for each."""
    problems = []
    for system in systems:
        try:
            if system.is_imported:
                teacher_options(registry, system)
        except RecipeError as error:
            problems += error.problems
    return problems
