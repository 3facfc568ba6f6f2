"""Writes the beginning of a plugin package from ``templates/``."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from pathlib import Path

from kdrecipe import __version__
from kdrecipe.errors import KdrecipeError

TEMPLATES_DIR = Path(__file__).parent / "templates"
TEMPLATES = ("architecture", "compressor", "corpus", "decoder", "loss", "metric")
SUFFIX = ".tmpl"  # keeps tools from taking templates for code


def write_plugin(name: str, kind: str, parent: Path) -> Path:
    """Write a package for a plugin.

    Args:
        name: how recipes will call it.
        kind: one of :data:`TEMPLATES`.
        parent: an existing directory; the package becomes ``parent/name``.

    Returns:
        The package's directory.

    Raises:
        KdrecipeError: the name is none or taken, or the directory exists; nothing is written then.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        suggestion = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")
        remedy = "lower-case letters, digits and underscores, a letter first"
        remedy += f": {suggestion}" if suggestion and not keyword.iskeyword(suggestion) else ""
        raise KdrecipeError(f"{name!r} can't name a plugin", remedy=remedy)
    from kdrecipe.plugin.loader import installed_names

    if name in installed_names():
        raise KdrecipeError(f"a plugin {name!r} is installed already", remedy="choose another name")
    target = parent / name
    if not parent.is_dir():
        raise KdrecipeError("there is no such directory", where=str(parent), remedy=f"mkdir -p {parent}")
    if target.exists():
        raise KdrecipeError(
            "exists already, nothing was written", where=str(target), remedy="choose another name or --dir"
        )
    values = {
        "name": name,
        "module": f"kdrecipe_{name}",
        "package": f"kdrecipe-{name.replace('_', '-')}",
        "class": "".join(part.capitalize() for part in name.split("_")),
        "kind": kind,
        "version": ".".join(__version__.split(".")[:2]),
    }
    # Written beside the target and moved at the end: no half of a package after a failure.
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
    try:
        for folder in (TEMPLATES_DIR / "package", TEMPLATES_DIR / kind):
            for template in sorted(folder.rglob(f"*{SUFFIX}")):
                _write(template, building / _fill(str(template.relative_to(folder)), values), values)
        building.chmod(0o755)  # mkdtemp keeps it to ourselves
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return target


def _write(template: Path, path: Path, values: dict[str, str]) -> None:
    path = path.with_name(path.name.removesuffix(SUFFIX))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_fill(template.read_text(encoding="utf-8"), values), encoding="utf-8")


def _fill(text: str, values: dict[str, str]) -> str:
    """Replace ``@name@`` by the value of ``name``."""
    return re.sub(r"@([a-z]+)@", lambda match: values[match.group(1)], text)
