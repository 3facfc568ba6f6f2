"""Holds parts of a YAML document against pydantic models and plugins, collecting problems.

Each problem gets the line it is about, unknown keys and names a did-you-mean. A part that is wrong
is left out and the rest is still looked at, so that all mistakes are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from kdrecipe.errors import Problem, did_you_mean
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.yaml import Document, KeyPath

ModelT = TypeVar("ModelT", bound=BaseModel)


class Validator:
    """Looks at the parts of one document; :attr:`problems` grows meanwhile."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry
        self.problems: list[Problem] = []

    def problem(self, path: KeyPath, what: str, remedy: str = "") -> None:
        """Note a problem at a key path; the same one twice counts once."""
        found = Problem(f"{dotted(path)}: {what}" if path else what, self.document.where(path), remedy)
        if found not in self.problems:
            self.problems.append(found)

    def validate(
        self, model: type[ModelT], data: Any, path: KeyPath, *, beside: Iterable[str] = ()
    ) -> ModelT | None:
        """``data`` as a model, or None with its problems noted; ``beside``: more keys allowed there."""
        if data is None:
            data = {}
        if not isinstance(data, dict):
            self._not_a_mapping(data, path)
            return None
        try:
            return model.model_validate(data)
        except ValidationError as error:
            for detail in error.errors():
                self._report(model, detail, data, path, beside)
            return None

    def _report(
        self, model: type[BaseModel], detail: Any, data: Any, path: KeyPath, beside: Iterable[str]
    ) -> None:
        kind, loc = detail["type"], _existing(data, detail["loc"])
        if kind == "extra_forbidden":
            known = _keys_at(model, loc[:-1])
            known |= set(beside) if len(loc) == 1 else set()
            self.problem((*path, *loc), "unknown key", did_you_mean(str(loc[-1]), known))
        elif kind == "missing":
            self.problem((*path, *loc[:-1]), f"{loc[-1]} is missing")
        elif kind == "value_error":
            self.problem((*path, *loc), str(detail["ctx"]["error"]))
        elif kind == "dict_type":
            self._not_a_mapping(detail["input"], (*path, *loc))
        elif kind == "too_short":
            self.problem((*path, *loc), "is empty")
        else:
            message = detail["msg"].replace("Input should", "should")
            self.problem((*path, *loc), f"is {short(detail['input'])}, {message}")

    def _not_a_mapping(self, data: Any, path: KeyPath) -> None:
        example = f"{{name: {data}}}" if isinstance(data, str) else "{key: value, ...}"
        self.problem(path, f"is {short(data)}, it must be a mapping", f"write {example}")

    def named(self, kind: str, data: Any, path: KeyPath, *, beside: Iterable[str] = ()) -> Named | None:
        """A plugin ``{name, <options>}``; ``beside``: keys there that are not the plugin's."""
        if not isinstance(data, dict):
            self._not_a_mapping(data, path)
            return None
        name = data.get("name")
        if not isinstance(name, str):
            what = "name is missing" if name is None else f"name is {short(name)}, it must be text"
            self.problem(path, what, f"known: {', '.join(self.registry.names(kind))}")
            return None
        options = {k: v for k, v in data.items() if k not in ("name", *beside)}
        return self.plugin(kind, name, options, path, (*path, "name"), beside=("name", *beside))

    def plugin(
        self,
        kind: str,
        name: str,
        options: Any,
        path: KeyPath,
        name_path: KeyPath,
        *,
        beside: Iterable[str] = (),
    ) -> Named | None:
        """The plugin ``name`` with ``options``, which stand at ``path``."""
        problem = self.registry.problem(kind, name)
        if problem is not None:
            self.problem(name_path, problem.what, problem.remedy)
            return None
        config = self.validate(self.registry.get(kind, name).Config, options, path, beside=beside)
        return Named(name, config.model_dump(mode="json", by_alias=True)) if config is not None else None

    def section(self, model: type[ModelT], key: str) -> ModelT:
        """A section of the core's own; its defaults if it is absent or wrong."""
        data = self.document.data.get(key)
        found = self.validate(model, data, (key,)) if data is not None else None
        return found if found is not None else model.model_construct()

    def strings(self, data: Any, path: KeyPath) -> list[str]:
        """A list of texts."""
        if isinstance(data, list) and all(isinstance(x, str) for x in data):
            return data
        self.problem(path, f"is {short(data)}, it must be a list of texts")
        return []


def dotted(path: KeyPath) -> str:
    """``systems.kd.losses[1]``."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.lstrip(".")


def short(value: Any) -> str:
    """A value for a message, cut off where it gets long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _existing(data: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A pydantic location without the names of union members that it holds, last key included."""
    result: list[str | int] = []
    for number, key in enumerate(loc):
        present = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if present:
            data = data[key]
            result.append(key)
        elif isinstance(data, dict) and number == len(loc) - 1:
            result.append(key)  # a missing key
    return tuple(result)


def _keys_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> set[str]:
    """Keys that the model at ``loc`` knows."""
    current: type[BaseModel] | None = model
    for key in loc:
        fields = {f.alias or n: f for n, f in current.model_fields.items()} if current else {}
        if key in fields:
            current = _model_in(fields[str(key)].annotation)
    return {f.alias or n for n, f in current.model_fields.items()} if current else set()


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model within an annotation such as ``SpecAugment | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found is not None:
            return found
    return None
