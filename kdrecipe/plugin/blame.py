"""Whose code an exception comes from.

Plugins are called from everywhere, also for every batch, and nothing is wrapped around these calls: whoever
ends the process looks at the traceback, and finds the plugin in it.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from kdrecipe.errors import KdrecipeError, PluginError
from kdrecipe.plugin.loader import Plugins, last_loaded
from kdrecipe.plugin.registry import KINDS, Source
from kdrecipe.plugin.source_code import own_files

_MAX_TEXT = 600  # characters of the exception's own text: torch lists every key of a state dict


def blamed(error: BaseException) -> PluginError | None:
    """The error to report where a plugin from outside is in the traceback; None: the core's own bug.

    Names the plugin, its kind, the innermost line of it, the exception, and where that was raised if it was
    elsewhere. Errors that are for users (:class:`KdrecipeError`) are nobody's fault.
    """
    plugins = last_loaded()
    if plugins is None or isinstance(error, KdrecipeError):
        return None
    owners = _files(plugins)
    frames = list(traceback.walk_tb(error.__traceback__))
    for frame, line in reversed(frames):
        path = _file(frame)
        if (source := owners.get(path)) is None:
            continue
        innermost, its_line = frames[-1]
        raised = f"{type(error).__name__}: {_clipped(str(error))}".rstrip(": ")
        if innermost.f_code.co_filename != frame.f_code.co_filename:
            raised += f" (raised at {innermost.f_code.co_filename}:{its_line})"
        name, method = _at_work(plugins, source, [f for f, _ in frames if owners.get(_file(f)) == source])
        by = f", by {frame.f_code.co_name}" if method != frame.f_code.co_name else ""
        return PluginError(
            f"{name} failed in {method}{by}: {raised}",
            where=f"{path}:{line}",
            remedy=f"correct it, or ask who made it ({source}); KDRECIPE_TRACE=1 shows the whole traceback",
        )
    return None


def strangers() -> list[str]:
    """What loaded plugins from outside have registered, as ``loss 'mine'``: to be suspected, too."""
    plugins = last_loaded()
    if plugins is None:
        return []
    registry = plugins.registry
    listed = [(kind, name) for kind in KINDS for name in registry.names(kind)]
    return [f"{KINDS[k]} {n!r}" for k, n in listed if registry.source(k, n) in _foreign(plugins)]


def _foreign(plugins: Plugins) -> list[Source]:
    return [source for source in plugins.sources.values() if source.package != "kdrecipe"]


def _files(plugins: Plugins) -> dict[Path, Source]:
    """The files of plugins that are not shipped."""
    return {
        file: source
        for source in _foreign(plugins)
        if source.path is not None and source.path.suffix == ".py" and source.path.is_file()
        for file in {source.path, source.path.absolute(), *own_files(source.path)}
    }


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _at_work(plugins: Plugins, source: Source, frames: Sequence[FrameType]) -> tuple[str, str]:
    """``loss 'mine'`` and its method, of a source's frames; all that it registers where that is not known."""
    registry = plugins.registry
    own: list[tuple[str, str, Any]] = [
        (KINDS[kind], name, registry.get(kind, name))
        for kind in KINDS
        for name in registry.names(kind)
        if registry.source(kind, name) == source
    ]
    for frame in reversed(frames):
        working = frame.f_locals.get("self", frame.f_locals.get("cls"))
        for kind, name, cls in own:
            if isinstance(cls, type) and (working is cls or isinstance(working, cls)):
                return f"{kind} {name!r}", frame.f_code.co_name
    listed = ", ".join(f"{kind} {name!r}" for kind, name, _ in own)
    return f"the plugin {source.name!r}" + (f" ({listed})" if listed else ""), frames[0].f_code.co_name


def _clipped(text: str) -> str:
    text = "\n".join(text.strip().splitlines()[:8])
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
