"""Plugin files that travel with a bundle, and the consent that their code needs before it runs.

``bundle.json`` lists them as ``plugin_files: {name: sha256}``. A name is a file in the bundle's own
directory and nothing else. Reading the list, checking and copying the files run none of their code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import read_json, sha256_bytes, sha256_file, write_atomic
from kdrecipe.errors import KdrecipeError, PluginError, Problem

FORMAT = 2
"""Number of the format in which bundles are written, and the only one that is read."""

CONSENT = "read the code; if you trust it, give --trust-plugins"
_NAME = re.compile(r"\w[\w.+-]*\.py", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_description(directory: Path) -> dict[str, Any]:
    """The content of ``bundle.json``, refused where its format or its list of plugin files is not right.

    Raises:
        KdrecipeError: there is none, it is damaged, of another format, or names a plugin file that does
            not lie beside it.
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
            f"bundle format {version}, this version reads {FORMAT}",
            where=str(directory),
            remedy="make it again with this version of kdrecipe, or use the one that made it",
        )
    assert isinstance(meta, dict)
    _check_list(meta.get("plugin_files", {}), path)
    return meta


def _check_list(files: Any, where: Path) -> None:
    """Refuse all but base names with their hashes."""
    entries = files.items() if isinstance(files, dict) else [(files, None)]
    for name, digest in entries:
        is_name = isinstance(name, str) and _NAME.fullmatch(name)
        if not (is_name and isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise PluginError(
                f"plugin_files: {name!r} is not the plain name of a .py file in the bundle with its SHA-256",
                where=str(where),
                remedy="do not use this bundle: its description was made or changed by hand",
            )


def verified(directory: Path, files: Mapping[str, str]) -> dict[Path, str]:
    """The plugin files of a bundle's list, absolute path -> SHA-256, each as it was recorded.

    Raises:
        PluginError: naming every file that is missing or was changed since.
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
    """The problem of a bundle whose code would have to run without consent."""
    what = f"the bundle {directory} brings code of its own, which does not run unasked: {', '.join(names)}"
    return Problem(what, where or str(directory), remedy)


def carry(files: Iterable[Path], out: Path) -> dict[str, str]:
    """Copy plugin files into a bundle's directory ``out``; the list to record there.

    Files of equal content are one. Of different files with one name, those after the first are stored
    under a name with a part of their hash.
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
