"""Who offers what: classes by kind and name, each with its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdrecipe.errors import PluginError, Problem, did_you_mean
from kdrecipe.interfaces import Options, Runtime
from kdrecipe.plugin.source_code import plugin_hash

KINDS: Mapping[str, str] = {
    "architectures": "architecture",
    "heads": "head",
    "losses": "loss",
    "teachers": "teacher",
    "compressors": "compressor",
    "exporters": "exporter",
    "decoders": "decoder",
    "metrics": "metric",
    "corpora": "corpus",
    "commands": "command",
}
"""Kinds of plugins, plural -> singular."""

RESERVED: Mapping[str, frozenset[str]] = {
    "architectures": frozenset({"name", "heads"}),
    "losses": frozenset({"name", "weight", "teacher"}),
    "teachers": frozenset({"name", "bundle", "text"}),
    "corpora": frozenset({"name", "root", "on_error", "max_utterances", "subsets"}),
}
"""Keys that stand beside a plugin's options in the recipe, so that no option may bear them."""


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from.

    Args:
        name: entry-point name, module name (built in) or file name.
        package: distribution that ships it; empty for a local file.
        version: of that distribution.
        path: the Python file, if there is one.
    """

    name: str
    package: str = ""
    version: str = ""
    path: Path | None = None

    def __str__(self) -> str:
        if self.package:
            return f"{self.package} {self.version} ({self.name})"
        return str(self.path or self.name)

    def fingerprint(self) -> str:
        """Changes when the plugin's code does: its package's version and a hash of its code.

        All that the plugin imports from its own package counts, see
        :func:`kdrecipe.plugin.source_code.plugin_hash`.
        """
        parts = [self.package or self.name, self.version]
        if self.path is not None and self.path.suffix == ".py" and self.path.exists():
            parts.append(plugin_hash(self.path))
        return " ".join(p for p in parts if p)


@dataclass(frozen=True)
class Entry:
    """A registered class and its source."""

    cls: Any
    source: Source


class Registry:
    """Classes by kind and name. A name that is taken twice belongs to neither until that is resolved."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
        self._conflicts: dict[tuple[str, str], tuple[Source, ...]] = {}
        self.broken: dict[str, str] = {}
        """Plugins that could not be loaded -> reason; kept here for the messages of :meth:`get`."""
        self.left_out: tuple[str, ...] = ()
        """Installed plugins that KDRECIPE_PLUGINS leaves out, for the same messages."""

    def add(self, kind: str, name: str, cls: Any, source: Source | str) -> None:
        """Register ``cls``; PluginError for a bad name, a class without Config or a taken name."""
        if isinstance(source, str):
            source = Source(source)
        _check_class(kind, name, cls, source)
        taken = self._entries[kind].get(name)
        if taken is not None:
            sources = self._conflicts.get((kind, name), (taken.source,))
            self._conflicts[kind, name] = (*sources, source)
            raise PluginError(self._conflict(kind, name))
        self._entries[kind][name] = Entry(cls, source)

    def remove_source(self, source: Source) -> None:
        """Forget all that ``source`` registered (its conflicts stay on record)."""
        for entries in self._entries.values():
            for name in [n for n, e in entries.items() if e.source is source]:
                del entries[name]

    def get(self, kind: str, name: str) -> Any:
        """The class; PluginError with a did-you-mean if unknown, naming both if claimed twice."""
        problem = self.problem(kind, name)
        if problem is not None:
            raise PluginError(problem)
        return self._entries[kind][name].cls

    def problem(self, kind: str, name: str, where: str = "") -> Problem | None:
        """Why ``name`` can't be used, or None."""
        if (kind, name) in self._conflicts:
            conflict = self._conflict(kind, name)
            return Problem(conflict.what, where, conflict.remedy)
        if name in self._entries[kind]:
            return None
        what = f"unknown {KINDS[kind]} {name!r}"
        if name in self.broken:
            reason = f"the plugin {name!r} could not be loaded: {self.broken[name]}"
            return Problem(f"{what}: {reason}", where, "kdrecipe plugins doctor")
        remedy = did_you_mean(name, self._entries[kind])
        if self.broken:
            remedy += f" (plugins that could not be loaded: {', '.join(sorted(self.broken))})"
        if self.left_out:
            remedy += f" (KDRECIPE_PLUGINS leaves out: {', '.join(self.left_out)})"
        return Problem(what, where, remedy)

    def config(self, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Options:
        """The plugin's validated ``Config``; PluginError naming each bad option."""
        cls = self.get(kind, name)
        try:
            config: Options = cls.Config.model_validate(dict(options or {}))
        except ValidationError as error:
            raise PluginError(
                Problem(f"{KINDS[kind]} {name!r}: {'.'.join(map(str, e['loc']))}: {e['msg']}")
                for e in error.errors()
            ) from None
        return config

    def names(self, kind: str) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._entries[kind])

    def source(self, kind: str, name: str) -> Source:
        """Where it comes from."""
        self.get(kind, name)
        return self._entries[kind][name].source

    def fingerprint(self, kind: str, name: str) -> str:
        """Changes when the plugin's code or version does."""
        return self.source(kind, name).fingerprint()

    def conflicts(self) -> list[Problem]:
        """All names that were claimed twice."""
        return [self._conflict(kind, name) for kind, name in sorted(self._conflicts)]

    def _conflict(self, kind: str, name: str) -> Problem:
        sources = " and ".join(str(s) for s in self._conflicts[kind, name])
        return Problem(
            f"{KINDS[kind]} {name!r} is registered by {sources}",
            remedy="rename one of them, uninstall one, or choose with KDRECIPE_PLUGINS",
        )


def _check_class(kind: str, name: str, cls: Any, source: Source) -> None:
    """PluginError unless the name is one and the class can be configured."""
    if kind not in KINDS:
        raise PluginError(f"unknown kind {kind!r}", where=str(source), remedy=did_you_mean(kind, KINDS))
    pattern = r"[a-z][a-z0-9_-]*" if kind == "commands" else r"[a-z][a-z0-9_]*"
    if not isinstance(name, str) or not re.fullmatch(pattern, name):
        raise PluginError(
            f"{name!r} can't name a {KINDS[kind]}",
            where=str(source),
            remedy="lower-case letters, digits and underscores, a letter first",
        )
    if kind == "commands":
        return
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Options)):
        raise PluginError(
            f"{KINDS[kind]} {name!r} has no nested Config",
            where=str(source),
            remedy="class Config(kdrecipe.interfaces.Options): ... with its options, or with none",
        )
    if other := set(getattr(cls, "tiny_options", {})) - set(config.model_fields):
        raise PluginError(
            f"{KINDS[kind]} {name!r}: tiny_options names {', '.join(sorted(other))}, which is no option",
            where=str(source),
            remedy=f"its options: {', '.join(config.model_fields) or 'none'}",
        )
    if kind == "exporters" and not isinstance(getattr(cls, "runtime", None), Runtime | None):
        raise PluginError(
            f"exporter {name!r}: its runtime is {cls.runtime!r}",
            where=str(source),
            remedy="runtime = kdrecipe.interfaces.Runtime(name, start, searches), or None",
        )
    for key in RESERVED.get(kind, frozenset({"name"})) & set(config.model_fields):
        raise PluginError(
            f"{KINDS[kind]} {name!r}: an option can't be called {key!r}, the recipe has a key of that name",
            where=str(source),
            remedy="rename the option",
        )
