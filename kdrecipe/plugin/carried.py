"""Plugin files in a bundle, and the consent that is needed before their code runs.

``bundle.json`` lists them as ``plugin_files: {name: sha256}``. A name is that of a file in the bundle's own
directory. Reading the list and checking or copying the files runs none of their code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import read_json, sha256_bytes, sha256_file, write_atomic
from kdrecipe.errors import KdrecipeError, PluginError, Problem

FORMAT = 2
"""The format in which bundles are written, and the only one that is read."""

CONSENT = "read the code; if you trust it, give --trust-plugins"
_NAME = re.compile(r"\w[\w.+-]*\.py", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_description(directory: Path) -> dict[str, Any]:
    """The content of ``bundle.json``; its format and its list of plugin files are checked.

    Raises:
        KdrecipeError: it is missing, damaged or of another format, or lists a plugin file that is not in
            the bundle's directory.
    """
    path = directory / "bundle.json"
    if not path.exists():
        raise KdrecipeError(
            "not a bundle: there is no bundle.json in it",
            where=str(directory),
            remedy="give the directory of a trained system, e.g. exp/systems/kd/seed1",
        )
    meta = read_json(path)
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT:
        raise KdrecipeError(
            f"bundle format {version}; this version reads format {FORMAT}",
            where=str(directory),
            remedy="make the bundle again with this version of kdrecipe, or use the version that made it",
        )
    assert isinstance(meta, dict)
    _check_list(meta.get("plugin_files", {}), path)
    return meta


def _check_list(files: Any, where: Path) -> None:
    """Refuse everything but plain file names with hashes."""
    entries = files.items() if isinstance(files, dict) else [(files, None)]
    for name, digest in entries:
        is_name = isinstance(name, str) and _NAME.fullmatch(name)
        if not (is_name and isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise PluginError(
                f"plugin_files: {name!r} is not the plain name of a .py file in the bundle with its SHA-256",
                where=str(where),
                remedy="do not use this bundle: its bundle.json was written or changed by hand",
            )


def verified(directory: Path, files: Mapping[str, str]) -> dict[Path, str]:
    """The plugin files that a bundle lists, absolute path -> SHA-256, after comparing each with its hash.

    Raises:
        PluginError: names every file that is missing or was changed after the bundle was made.
    """
    found, problems = {}, []
    remedy = "do not run it: ask whoever made the bundle for a new copy"
    for name, digest in files.items():
        path = directory.absolute() / name
        if not path.is_file():
            problems.append(Problem("no such plugin file", str(path), remedy))
        elif sha256_file(path) != digest:
            problems.append(Problem("changed after the bundle was made", str(path), remedy))
        else:
            found[path] = digest
    if problems:
        raise PluginError(problems)
    return found


def refusal(directory: Path, names: Iterable[str], remedy: str = CONSENT, where: str = "") -> Problem:
    """The problem to report for a bundle that contains code for which there is no consent."""
    what = f"the bundle {directory} brings code of its own, which does not run unasked: {', '.join(names)}"
    return Problem(what, where or str(directory), remedy)


def carry(files: Iterable[Path], out: Path) -> dict[str, str]:
    """Copy plugin files into a bundle's directory ``out``; returns the list for ``bundle.json``.

    Files of equal content are stored once. If different files have the same name, the first keeps it, and
    the names of the others contain a part of their hash.
    """
    recorded: dict[str, str] = {}
    for path in files:
        data = path.read_bytes()
        digest = sha256_bytes(data)
        if digest in recorded.values():
            continue
        name = re.sub(r"[^\w.+-]", "_", path.name, flags=re.ASCII)
        if name in recorded or not _NAME.fullmatch(name):
            name = f"plugin_{name.removesuffix('.py')}_{digest[:8]}.py"
        write_atomic(out / name, data)
        recorded[name] = digest
    return recorded
