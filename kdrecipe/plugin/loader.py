"""Loads plugins: shipped ones by folder, the entry-point group ``kdrecipe``, files beside a recipe.

One by one: a plugin that fails is taken out again and kept in :attr:`Plugins.broken` with the
reason; it stops only a recipe that names it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType
from typing import Any

import click
import pluggy

import kdrecipe
from kdrecipe.errors import KdrecipeError, PluginError, Problem, did_you_mean
from kdrecipe.plugin import hookspecs
from kdrecipe.plugin.registry import KINDS, Registry, Source

GROUP = "kdrecipe"
BUILT_IN = ("kdrecipe.model.heads.ctc", "kdrecipe.model.heads.attention", "kdrecipe.model.heads.rnnt")
SHIPPED = ("kdrecipe_plugins", "kdrecipe_local")
"""Packages whose modules are plugins wherever they carry ``@hookimpl``: found by folder, declared nowhere."""
CORE_COMMANDS = (
    "bench", "check", "compare", "demo", "new", "plugins", "regenerate", "run", "sensitivity", "stages",
    "status", "transcribe",
)  # fmt: skip


class _Commands(click.Group):
    """Handed to ``register_commands``: what is added to it is registered like all else."""

    def __init__(self, register: Callable[[str, Any], None]) -> None:
        super().__init__("kdrecipe")
        self._register = register

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        self._register(name or cmd.name or "", cmd)


class Plugins:
    """What is loaded: ``registry`` (classes), ``pm`` (pluggy, for the other hooks), ``broken``."""

    def __init__(self, *, trace: bool = False) -> None:
        self.registry = Registry()
        self.pm = pluggy.PluginManager(GROUP)
        self.pm.add_hookspecs(hookspecs)
        self.sources: dict[str, Source] = {}
        self._current = Source("kdrecipe", "kdrecipe", kdrecipe.__version__)
        for name in CORE_COMMANDS:
            self.registry.add("commands", name, None, self._current)
        if trace:
            self.pm.add_hookcall_monitoring(_trace_before, _trace_after)
        # Memorised first: pluggy then calls these hooks as soon as a plugin is registered, so
        # that a failure belongs to that plugin.
        for kind in KINDS:
            hook = getattr(self.pm.hook, f"register_{kind}")
            register = partial(self._register, kind)
            if kind == "commands":
                hook.call_historic(kwargs={"cli": _Commands(register)})
            else:
                hook.call_historic(kwargs={"register": register})

    @property
    def broken(self) -> dict[str, str]:
        """Plugins that could not be loaded -> reason."""
        return self.registry.broken

    def hooks_of(self, name: str) -> list[str]:
        """Names of the hooks that a loaded plugin implements."""
        callers = self.pm.get_hookcallers(self.pm.get_plugin(name)) or []
        return sorted(c.name for c in callers)

    def fingerprints(self, hook: str) -> list[str]:
        """Fingerprints of all loaded plugins that implement a hook, sorted."""
        return sorted(s.fingerprint() for name, s in self.sources.items() if hook in self.hooks_of(name))

    def load(self, name: str, source: Source, find: Callable[[], Any]) -> None:
        """Register the object that ``find`` returns; on failure note the reason and clean up."""
        if name in self.sources:
            name = f"{source.package or source.path}:{name}"
        self._current = source
        try:
            plugin = find()
            _check_arguments(plugin)
            self.pm.register(plugin, name=name)
            self.pm.check_pending()
        except (Exception, SystemExit) as error:
            # pluggy leaves a plugin registered whose hooks failed
            if self.pm.has_plugin(name):
                self.pm.unregister(name=name)
            self.registry.remove_source(source)
            self.broken[name] = reason(error)
        else:
            self.sources[name] = source

    def _register(self, kind: str, name: str, cls: Any) -> None:
        self.registry.add(kind, name, cls, self._current)


def load_plugins(files: Sequence[Path] = (), env: Mapping[str, str] = os.environ) -> Plugins:
    """Load all plugins.

    Args:
        files: local plugin files; the caller names them, so a broken one is an error.
        env: ``KDRECIPE_PLUGINS`` (comma-separated names of plugins, maybe none) restricts which of the
            shipped and installed ones load; ``KDRECIPE_TRACE=1`` prints every hook call to stderr.

    Raises:
        PluginError: a file is missing or broken, or KDRECIPE_PLUGINS names what is not installed.
    """
    plugins = Plugins(trace=env.get("KDRECIPE_TRACE", "") not in ("", "0"))
    for module in BUILT_IN:
        source = Source(module, "kdrecipe", kdrecipe.__version__, _module_path(module))
        plugins.load(module, source, partial(importlib.import_module, module))
    points = available()
    chosen = _chosen(points, env.get("KDRECIPE_PLUGINS"))
    plugins.registry.left_out = tuple(sorted({p.name for p in points} - {p.name for p in chosen}))
    for point in chosen:
        plugins.load(point.name, _entry_point_source(point), point.load)
    problems = []
    for path in files:
        name = _flat_name(path)
        if not path.is_file():
            problems.append(Problem("no such plugin file", str(path)))
            continue
        plugins.load(name, Source(path.name, path=path), partial(_load_file, path, name))
        if name in plugins.broken:
            problems.append(Problem(f"plugin can't be loaded: {plugins.broken[name]}", str(path)))
    global _last
    _last = plugins
    if problems:
        raise PluginError(problems)
    return plugins


_last: Plugins | None = None


def last_loaded() -> Plugins | None:
    """What this process has loaded last: a plugin that fails is looked for among these."""
    return _last


def available() -> list[EntryPoint]:
    """Plugins that can be loaded: those in the folders of :data:`SHIPPED`, and installed packages' own."""
    return [*shipped(), *entry_points(group=GROUP)]


def installed_names() -> list[str]:
    """Names of all plugins that can be loaded, without loading any."""
    return sorted({p.name for p in available()})


def shipped() -> list[EntryPoint]:
    """The plugins in the folders of :data:`SHIPPED`, each named as its file (a package: as its folder)."""
    found = []
    for package in SHIPPED:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            found += [
                EntryPoint(p.rpartition(".")[2], p, GROUP) for p in _plugin_modules(Path(folder), package)
            ]
    return found


def _plugin_modules(folder: Path, package: str) -> Iterator[str]:
    """Modules below ``folder`` whose text has ``@hookimpl``; a package that is one is not looked into."""
    for path in sorted(folder.iterdir()):
        name = f"{package}.{path.stem}"
        if path.is_dir() and (path / "__init__.py").is_file():
            if _has_hooks(path / "__init__.py"):
                yield name
            else:
                yield from _plugin_modules(path, name)
        elif path.suffix == ".py" and path.stem != "__init__" and _has_hooks(path):
            yield name


def _has_hooks(path: Path) -> bool:
    return re.search(rb"^@hookimpl\b", path.read_bytes(), re.MULTILINE) is not None


def _chosen(points: Iterable[EntryPoint], wanted: str | None) -> list[EntryPoint]:
    """The entry points to load, sorted by name so that the order never depends on the machine."""
    unique = {(p.name, p.value): p for p in points}  # one found twice on sys.path is still one
    chosen = [unique[key] for key in sorted(unique)]
    if wanted is None:
        return chosen
    names = {n.strip() for n in wanted.split(",") if n.strip()}
    known = {p.name for p in chosen}
    if names - known:
        raise PluginError(
            Problem(f"no installed plugin is called {n!r}", "KDRECIPE_PLUGINS", did_you_mean(n, known))
            for n in sorted(names - known)
        )
    return [p for p in chosen if p.name in names]


def _entry_point_source(point: EntryPoint) -> Source:
    ours = point.module.split(".")[0] in SHIPPED
    package = point.dist.name if point.dist else "kdrecipe" if ours else ""
    version = point.dist.version if point.dist else kdrecipe.__version__ if ours else ""
    return Source(point.name, package, version, _module_path(point.module))


def _module_path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a broken parent package: loading it will report the error
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _flat_name(path: Path) -> str:
    """A module name without dots, the same in every process of a run."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    return f"kdrecipe_file_{path.stem}_{digest}"


class _AsWritten(SourceFileLoader):
    """Runs a file as it is written, never a compiled copy in ``__pycache__``, which may hold other code."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the file."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: Path, name: str) -> Any:
    """Execute a plugin file as module ``name``."""
    if path.suffix != ".py":
        raise PluginError("a plugin file must end in .py", where=str(path))
    loader = _AsWritten(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # In sys.modules before it runs: dataclasses look up their annotations there.
    with _restored_on_error(name):
        sys.modules[name] = module
        loader.exec_module(module)
    return module


@contextmanager
def _restored_on_error(name: str) -> Iterator[None]:
    before = sys.modules.get(name)
    try:
        yield
    except BaseException:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
        raise


def _check_arguments(plugin: Any) -> None:
    """Refuse hook implementations with defaults: pluggy never passes those arguments."""
    for attribute in dir(plugin):
        function = getattr(plugin, attribute, None)
        if not (inspect.isroutine(function) and getattr(function, f"{GROUP}_impl", None)):
            continue
        for argument in inspect.signature(function).parameters.values():
            if argument.default is not argument.empty:
                raise PluginError(
                    f"{attribute}: the argument {argument.name!r} has a default and would never be passed",
                    remedy=f"write {attribute}(..., {argument.name})",
                )


def reason(error: BaseException) -> str:
    """One line on what a plugin's code raised: what, and where in the plugin."""
    if isinstance(error, KdrecipeError):
        return "; ".join(str(p).replace("\n    -> ", ": ") for p in error.problems)
    text = " ".join(str(error).split())
    if isinstance(error, pluggy.PluginValidationError):
        found = re.search(r"unknown hook '(\w+)'", text)
        if found:
            known = [name for name, thing in vars(hookspecs).items() if hasattr(thing, f"{GROUP}_spec")]
            return f"unknown hook {found.group(1)!r}: {did_you_mean(found.group(1), known)}"
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    foreign = [f for f in frames if Path(__file__).parents[1] not in Path(f.filename).parents]
    place = f" (at {foreign[-1].filename}:{foreign[-1].lineno})" if foreign else ""
    return f"{type(error).__name__}: {text}{place}"


def _trace_before(hook_name: str, hook_impls: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    plugins = ", ".join(i.plugin_name for i in hook_impls) or "nobody"
    print(f"kdrecipe: hook {hook_name}({', '.join(kwargs)}) -> {plugins}", file=sys.stderr)


def _trace_after(outcome: Any, hook_name: str, hook_impls: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not hook_impls:
        return
    result = f"failed: {outcome.exception!r}" if outcome.exception else repr(outcome.get_result())
    print(f"kdrecipe: hook {hook_name} = {result:.200}", file=sys.stderr)
