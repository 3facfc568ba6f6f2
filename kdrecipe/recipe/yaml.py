"""Reads YAML strictly and remembers where everything stands.

Stricter than PyYAML, which keeps the last of duplicate keys, reads ``1e-3`` as text and ``no`` as
False. Here duplicate keys are errors, ``1e-3`` is a number, only ``true`` and ``false`` are
booleans, dates stay text, and tags (``!!python/...``) are refused: a recipe is data.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdrecipe.errors import Problem, RecipeError, closest

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top: ``("systems", "kd", "distill", "losses", 0)``."""

MAX_NODES = 100_000  # aliases of aliases can blow a small file up to any size


class _Loader(yaml.SafeLoader):
    """The YAML 1.2 core schema instead of PyYAML's 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


@dataclass
class Document:
    """A YAML file as plain Python, and where each value stands.

    Args:
        path: the file.
        data: its content: dict, list, str, int, float, bool or None.
        lines: key path -> ``file:line`` (or the ``--set`` that put it there).
    """

    path: Path
    data: Any
    lines: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath = ()) -> str:
        """``recipe.yaml:12``: the line of that key, or of the closest one above it that exists."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, shown(self.path))

    def copy(self) -> Document:
        """A copy that may be changed."""
        return Document(self.path, copy.deepcopy(self.data), dict(self.lines))

    def merged(self, path: KeyPath) -> Document:
        """A copy with the mapping at ``path`` merged into the top: mappings deeply, others replaced."""
        result = self.copy()
        overlay: Any = self.data
        for key in path:
            overlay = overlay[key]
        _merge(result, overlay, path, ())
        return result

    def at(self, path: KeyPath) -> Any:
        """What stands at ``path``; None if nothing does."""
        return _at(self.data, path)

    def copied(self, source: KeyPath, target: KeyPath) -> Document:
        """A copy in which ``target`` holds what ``source`` does, with its lines; the mapping above exists."""
        result = self.copy()
        found, above = _at(result.data, source), _at(result.data, target[:-1])
        above[target[-1]] = copy.deepcopy(found)
        result._forget(target)
        result._take_lines(self, source, target)
        return result

    def path_of(self, keys: Iterable[str]) -> KeyPath:
        """The key path that ``keys`` mean: an item of a list is named by its number or its ``name``."""
        node, path = self.data, list[str | int]()
        for key in keys:
            part: str | int = _item(node, key) if isinstance(node, list) else key
            path.append(part)
            node = _at(node, (part,))
        return tuple(path)

    def set(self, path: KeyPath, value: Any, where: str) -> None:
        """Put ``value`` at ``path``, making mappings on the way.

        Raises:
            RecipeError: the path leads through something that is neither mapping nor list, or to
                a list item that does not exist.
        """
        if not isinstance(self.data, dict):
            self.data = {}
        node: Any = self.data
        for depth, key in enumerate(path[:-1]):
            if isinstance(node, dict) and node.get(str(key)) is None:
                node[str(key)] = {}
                self.lines[path[: depth + 1]] = where
            node = node[_slot(node, path, depth, where)]
        node[_slot(node, path, len(path) - 1, where)] = value
        self._forget(path)
        self._place(path, value, where)

    def _forget(self, path: KeyPath) -> None:
        for known in [p for p in self.lines if p[: len(path)] == path]:
            del self.lines[known]

    def _take_lines(self, other: Document, source: KeyPath, target: KeyPath) -> None:
        """The lines of ``source`` in ``other`` are those of ``target`` here."""
        found = {p: where for p, where in other.lines.items() if p[: len(source)] == source}
        self.lines.update({target + p[len(source) :]: where for p, where in found.items()})

    def _place(self, path: KeyPath, value: Any, where: str) -> None:
        self.lines[path] = where
        for key, item in _children(value):
            self._place((*path, key), item, where)


def load_yaml(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        RecipeError: it can't be read, or all that is wrong with its syntax, with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError("no such file", where=shown(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 (byte {error.start})", where=shown(path)) from None
    except OSError as error:
        raise RecipeError(f"can't be read: {error.strerror}", where=shown(path)) from None
    document = Document(path, {}, {(): f"{shown(path)}:1"})
    builder = _Builder(document)
    node = _compose(text, shown(path))
    document.data = builder.build(node, ()) if node is not None else {}
    if not isinstance(document.data, dict):
        builder.problems.append(Problem("the top level must be a mapping (key: value)", document.where()))
    if builder.problems:
        raise RecipeError(builder.problems)
    return document


def parse_value(text: str, where: str) -> Any:
    """Parse a single value as YAML (``--set key=value``); RecipeError if it is none."""
    document = Document(Path(where), None, {(): where})
    builder = _Builder(document, where)
    node = _compose(text, where, place=where)
    value = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise RecipeError(builder.problems)
    return value


def expand_env(text: str, where: str, env: Mapping[str, str] = os.environ) -> str:
    """Replace ``${NAME}`` (or ``${NAME:-default}``) by the environment variable.

    Raises:
        RecipeError: for each variable that is not set and has no default.
    """
    problems = []

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = env.get(name) or default
        if found is None:
            remedy = f"export {name}=..., or write the path into the recipe"
            problems.append(Problem(f"the environment variable {name} is not set", where, remedy))
        return found or ""

    expanded = re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}", value, text)
    if problems:
        raise RecipeError(problems)
    return expanded


def shown(path: Path) -> str:
    """``path`` for a person to read: relative if it is below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


# ---------------------------------------------------------------- building


def _compose(text: str, name: str, place: str = "") -> yaml.Node | None:
    """The node graph; RecipeError with the line for a syntax error."""
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place or (f"{name}:{mark.line + 1}" if mark else name)
        what = ", ".join(x for x in (error.context, error.problem) if x)
        remedy = "indent with spaces, not tabs" if "'\\t'" in what else ""
        raise RecipeError(f"not valid YAML: {what}", where=where, remedy=remedy) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=place or name) from None
    finally:
        loader.dispose()
    return node


class _Builder:
    """Turns YAML nodes into Python; collects problems and the line of every key path."""

    def __init__(self, document: Document, place: str = "") -> None:
        self.document = document
        self.place = place  # instead of file:line
        self.problems: list[Problem] = []
        self._open: list[yaml.Node] = []
        self._num_nodes = 0

    def where(self, node: yaml.Node) -> str:
        return self.place or f"{shown(self.document.path)}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The node's value; its line is recorded unless its key's was."""
        self.document.lines.setdefault(path, self.where(node))
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise RecipeError(f"more than {MAX_NODES} values, aliases written out", where=self.where(node))
        if any(node is parent for parent in self._open):
            self._problem(node, "an alias refers to a mapping or list that it is part of")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, "seq")
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        self._check_tag(node, "map")
        result: dict[str, Any] = {}
        for key, (key_node, value_node) in self._pairs(node, own=True).items():
            here = (*path, key)
            self.document.lines[here] = self.where(key_node)
            result[key] = self.build(value_node, here)
        return result

    def _pairs(self, node: yaml.Node, *, own: bool) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The entries of a mapping, after those merged with ``<<``, which they take precedence over."""
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                for base in self._bases(value_node):
                    for key, pair in self._pairs(base, own=False).items():
                        merged.setdefault(key, pair)  # of several bases the first one wins
                continue
            name = self._key(key_node)
            if name is None:
                continue
            if name in entries and own:
                first = self.where(entries[name][0])
                self._problem(key_node, f"duplicate key {name!r}, first given at {first}", "keep one of them")
            entries.setdefault(name, (key_node, value_node))
        return {**merged, **entries}

    def _bases(self, node: yaml.Node) -> list[yaml.Node]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for base in nodes:
            if not isinstance(base, yaml.MappingNode) or any(base is parent for parent in self._open):
                self._problem(base, "'<<' merges mappings: give it one alias, or a list of them")
                return []
        return list(nodes)

    def _key(self, node: yaml.Node) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._problem(node, "a key must be text")
        elif node.tag != "tag:yaml.org,2002:str":
            self._problem(node, f"the key {node.value!r} is not text", f'write it as "{node.value}"')
        else:
            return str(node.value)
        return None

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag.rpartition(":")[2], str(node.value)
        try:
            if tag == "null":
                return None
            if tag == "bool":
                return {"true": True, "false": False}[text.lower()]
            if tag == "int":
                return self._integer(node, int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)))
            if tag == "float":
                return float(re.sub(r"\.(?=[iInN])", "", text))
        except (ValueError, KeyError):
            self._problem(node, f"{text!r} is not a value of type {tag}")
            return None
        if tag not in ("str", "merge"):
            self._problem(node, f"the tag {node.tag!r} is not allowed: a recipe is data")
        return text

    def _integer(self, node: yaml.ScalarNode, value: int) -> int | None:
        if -(2**63) <= value < 2**63:
            return value
        self._problem(node, f"{str(node.value)[:40]} is beyond 64 bits", "nothing here counts so far")
        return None

    def _check_tag(self, node: yaml.Node, expected: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{expected}":
            self._problem(node, f"the tag {node.tag!r} is not allowed: a recipe is data")

    def _problem(self, node: yaml.Node, what: str, remedy: str = "") -> None:
        self.problems.append(Problem(what, self.where(node), remedy))


# ---------------------------------------------------------------- merging


def _at(node: Any, path: KeyPath) -> Any:
    """What stands at ``path``; None if nothing does."""
    for key in path:
        if isinstance(node, dict):
            node = node.get(key)
        else:
            here = isinstance(node, list) and isinstance(key, int) and key < len(node)
            node = node[key] if here else None
    return node


def _names(items: Sequence[Any]) -> list[str | None]:
    """The ``name`` of each item of a list, if it has one."""
    return [str(x["name"]) if isinstance(x, dict) and "name" in x else None for x in items]


def _item(items: Sequence[Any], key: str) -> str | int:
    """The number of the item that ``key`` means; ``key`` itself if that is not one item."""
    names = _names(items)
    if names.count(key) == 1:
        return names.index(key)
    return int(key) if re.fullmatch("[0-9]+", key) else key


def _children(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _merge(document: Document, overlay: Any, source: KeyPath, target: KeyPath) -> None:
    """Merge ``overlay``, found at ``source``, into ``document`` at ``target``, lines too."""
    node = document.data
    for key in target:
        node = node[key]
    for key, value in overlay.items():
        here, there = (*source, key), (*target, key)
        if isinstance(value, dict) and isinstance(node.get(key), dict):
            _merge(document, value, here, there)
            continue
        node[key] = copy.deepcopy(value)
        document._forget(there)
        document._take_lines(document, here, there)


def _slot(node: Any, path: KeyPath, depth: int, where: str) -> Any:
    """The key of ``path[depth]`` in ``node``: an index for a list, text for a mapping."""
    key, parent = path[depth], ".".join(map(str, path[:depth]))
    if isinstance(node, dict):
        return str(key)
    if not isinstance(node, list):
        raise RecipeError(f"{parent} is {node!r}, it has no {key!r} in it", where=where)
    if not re.fullmatch(r"[0-9]+", str(key)) or int(key) >= len(node):
        names = _names(node)
        close = closest(str(key), [name for name in names if name is not None])
        numbers = " and ".join(str(i) for i, name in enumerate(names) if name == close)
        hint = f"; {close!r} is number {numbers}" if close else ""
        have = f"it has {len(node)} item(s), counted from 0{hint}"
        raise RecipeError(f"{parent} is a list: {key!r} is no item of it", where=where, remedy=have)
    return int(key)
