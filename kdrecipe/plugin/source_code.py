"""Hashes of Python code: of a file, of a plugin with all that it imports from its own package, of the core.

Comments, docstrings and layout do not count. Imports are read from the syntax tree: nothing runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kdrecipe
from kdrecipe.artifacts import fingerprint

CORE = "kdrecipe"
_NAMED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+):[A-Za-z_]\w*", re.ASCII)
_FILE = re.compile(r"([A-Za-z_]\w*)\.py", re.ASCII)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_hash(path: Path) -> str:
    """Hash of what a Python file does, 16 hex digits; of its bytes where it is not valid Python."""
    return _look(path).hash


def plugin_hash(path: Path) -> str:
    """Hash of a plugin's file and of every module that it imports from its own package.

    Imports count wherever they stand (within functions, too) and are followed from module to module. A
    plugin's own package is the top-level package that its file belongs to; a file outside of packages
    has the modules in its folder instead. The core is nobody's own package: see :func:`core_hash`.
    """
    folder = path.resolve().parent
    found = {os.path.relpath(file, folder): code_hash(file) for file in own_files(path)}
    return fingerprint(found)[:16]


def own_files(path: Path) -> list[Path]:
    """The files that :func:`plugin_hash` covers, sorted; of a package, all files in its folder."""
    path = path.resolve()
    waiting = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [*_packages_of(file), *_imported_files(file)]
    return sorted(found)


@functools.cache
def core_hash() -> str:
    """Hash of the code of the package ``kdrecipe``, 16 hex digits; computed once per process.

    Results record it. It makes nothing stale; the report names rows that another core made.
    """
    root = Path(kdrecipe.__file__).parent
    return fingerprint({p.relative_to(root).as_posix(): code_hash(p) for p in root.rglob("*.py")})[:16]


# ---------------------------------------------------------------- reading a file


@dataclass(frozen=True)
class _Looked:
    """What is known of a file: the hash of its code, and its imports as (level, dotted name)."""

    hash: str
    imports: tuple[tuple[int, str], ...] = ()


def _look(path: Path) -> _Looked:
    state = path.stat()
    return _look_at(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4096)
def _look_at(path: Path, mtime_ns: int, size: int) -> _Looked:
    """Parse a file; time and size are there so that the cache notices a change."""
    data = path.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return _Looked(hashlib.sha256(data).hexdigest()[:16])
    imports = tuple(dict.fromkeys(_imports(tree)))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return _Looked(hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], imports)


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of each import; of ``from a import b`` both ``a`` and ``a.b``.

    Texts count, too: ``package.module:function`` and ``module.py``, a file in the same folder. An
    exporter names its runtime so.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield node.level, module
            for alias in node.names:
                yield node.level, f"{module}.{alias.name}".lstrip(".")
        elif isinstance(node, ast.Call) and node.args and _name(node.func) in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                dots = len(name.value) - len(name.value.lstrip("."))
                yield dots, name.value[dots:]
        elif isinstance(node, ast.Constant) and (named := _NAMED.fullmatch(str(node.value))):
            yield 0, named[1]
        elif isinstance(node, ast.Constant) and (named := _FILE.fullmatch(str(node.value))):
            yield 1, named[1]


def _name(function: ast.expr) -> str:
    return str(getattr(function, "attr", None) or getattr(function, "id", ""))


# ---------------------------------------------------------------- finding modules


def _imported_files(file: Path) -> Iterator[Path]:
    """Files of the modules that ``file`` imports from its own package, their packages included."""
    in_package = (file.parent / "__init__.py").is_file()
    for level, name in _look(file).imports:
        parts = name.split(".") if name else []
        if level:
            yield from _modules(file.parents[level - 1], parts)
            continue
        if not parts or parts[0] == CORE:
            continue
        roots = [root for root in _package_folders(parts[0]) if file.is_relative_to(root)]
        for root in roots:
            yield from _modules(root, parts[1:])
        if not roots and not in_package:
            yield from _modules(file.parent, parts)


def _packages_of(file: Path) -> Iterator[Path]:
    """The ``__init__.py`` of every package around a file: they run before it."""
    for folder in file.parents:
        if not (folder / "__init__.py").is_file():
            return
        yield folder / "__init__.py"


def _modules(folder: Path, parts: Iterable[str]) -> Iterator[Path]:
    """Files that an import of ``parts`` below ``folder`` runs: packages on the way, and the module."""
    package = folder / "__init__.py"
    found = [package] if package.is_file() else []
    for part in parts:
        module, folder = folder / f"{part}.py", folder / part
        package = folder / "__init__.py"
        if package.is_file():
            found.append(package)
        elif module.is_file():
            found.append(module)
            break
        elif not folder.is_dir():
            break
    yield from found


@functools.cache
def _package_folders(name: str) -> tuple[Path, ...]:
    """Folders of a top-level package; finding one runs none of its code. Empty for a module or nothing."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module made by hand has no specification
        return ()
    return tuple(Path(p).resolve() for p in (spec.submodule_search_locations if spec else None) or ())
