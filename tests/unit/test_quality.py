"""The code as a whole: linters are content, nothing is left to do, imports run one way."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kdrecipe", "plugins", "local", "recipes", "tests", "docs", "benchmarks")
TEXT = {".py", ".md", ".yaml", ".toml", ".cfg", ".sh", ".txt", ".tmpl", ".html", ".css", ".js"}


def shipped() -> list[Path]:
    """Every text file of the source tree."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [p for p in (*top, *below) if p.suffix in TEXT and "exp" not in p.relative_to(ROOT).parts]


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize(
    "arguments", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)], ids=" ".join
)
def test_the_tool_is_content(arguments):
    if importlib.util.find_spec(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed: pip install -e '.[test]'")
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_left_to_do():
    word = re.compile("TO" + "DO|FIX" + r"ME|\bX" + "XX")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in shipped()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if word.search(line)
    ]
    assert found == []


# ---------------------------------------------------------------- imports


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere: at its top, within functions, for types only, and by name
    through ``importlib`` (any text that looks like a module of ours)."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else ())))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and is_module(node.value):
            yield node.value


def is_module(text: object) -> bool:
    """Whether ``text`` is the dotted name of a module of ours."""
    if not isinstance(text, str) or not re.fullmatch(r"kdrecipe(_plugins|_local)?(\.\w+)+", text):
        return False
    folders = {"kdrecipe": "kdrecipe", "kdrecipe_plugins": "plugins", "kdrecipe_local": "local"}
    top, *rest = text.split(".")
    path = ROOT.joinpath(folders[top], *rest)
    return path.is_dir() or path.with_suffix(".py").is_file()


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def below(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


PLUGIN_MAY = (
    "kdrecipe.hookimpl",
    "kdrecipe.interfaces",
    "kdrecipe.errors",
    "kdrecipe.artifacts",
    "kdrecipe.corpus",
    "kdrecipe.data",
    "kdrecipe.frames",
    "kdrecipe.lattice",
    "kdrecipe.layers",
    "kdrecipe.text",
    "kdrecipe.__version__",
)


@pytest.mark.parametrize("folder", ["plugins", "local"])
def test_plugins_stand_on_what_strangers_stand_on(folder):
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files(folder)
        for module in imports(path)
        if below(module, "kdrecipe") and not below(module, *PLUGIN_MAY)
    ]
    assert wrong == []


FLOORS = [
    ("errors",),
    ("interfaces", "artifacts", "layers", "frames", "lattice", "text", "spoken_numbers", "text_form"),
    ("score", "corpus", "plugin"),
    ("report", "recipe", "data"),
    ("measure", "model", "jobs"),
    ("testing", "targets"),
    ("train",),
    ("stages",),
    ("cli",),
]
"""Parts of the core, from the bottom up: each may import its own floor and those below."""

BY_NAME = {("plugin", "model")}
"""The loader is given the names of the core's own heads, which are plugins like any other."""


def floor(part: str) -> int | None:
    return next((number for number, parts in enumerate(FLOORS) if part in parts), None)


def between_parts() -> Iterator[tuple[Path, str, str, str]]:
    """File, its part of the core, the part that it imports from, and the module."""
    for path in files("kdrecipe"):
        here = path.relative_to(ROOT / "kdrecipe").with_suffix("").parts[0]
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "kdrecipe" and len(parts) > 1 and parts[1] not in ("__version__", "hookimpl"):
                yield path, here, parts[1], module


def test_every_part_of_the_core_has_its_floor():
    parts = {p.relative_to(ROOT / "kdrecipe").with_suffix("").parts[0] for p in files("kdrecipe")}
    assert parts - {"__init__"} == {part for floor in FLOORS for part in floor}


def test_nobody_imports_from_a_floor_above():
    wrong = []
    for path, here, there, module in between_parts():
        mine, theirs = floor(here), floor(there)
        if mine is not None and (theirs is None or theirs > mine) and (here, there) not in BY_NAME:
            wrong.append(f"{path.relative_to(ROOT)}: {module}")
    assert wrong == []


def test_parts_of_one_floor_import_in_no_circle():
    edges = {(here, there) for _, here, there, _ in between_parts() if here != there} - BY_NAME
    found = [(a, b) for a, b in edges if (b, a) in edges]
    assert found == []


def test_the_core_imports_no_plugin():
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files("kdrecipe")
        for module in imports(path)
        if below(module, "kdrecipe_plugins", "kdrecipe_local")
    ]
    assert wrong == []


def test_stages_do_not_know_each_other():
    # report reads the list of hypotheses that score reads, long_utterances, rows and teacher_rows are parts
    # of features and decode; the others put stages together, or are shared
    known = {("report", "score"), ("features", "long_utterances"), ("decode", "rows")}
    known |= {("decode", "teacher_rows"), ("teacher_rows", "rows")}
    over = {"plan", "run", "team"}
    shared = {"session", "inputs", "layout", "needed", "teachers", "labels", "codebooks", "STAGES"}
    wrong = []
    for path in files("kdrecipe/stages"):
        for module in imports(path):
            parts = module.split(".")
            if parts[:2] == ["kdrecipe", "stages"] and len(parts) > 2 and path.stem not in over:
                pair = (path.stem, parts[2])
                if pair not in known and parts[2] not in shared:
                    wrong.append(pair)
    assert wrong == []


LIGHT = (
    *("cli.main", "cli.plugins", "cli.scaffold", "recipe.yaml", "recipe.load", "plugin.hookspecs"),
    *("plugin.registry", "plugin.loader", "errors", "interfaces", "artifacts", "jobs.plan", "model.bundle"),
)


def test_the_command_line_starts_without_torch():
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("kdrecipe." + name)
    heavy = {{"torch", "lhotse", "torchaudio", "onnx", "matplotlib", "scipy"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_measured_is_measured_without_torch():
    exporters = ROOT / "plugins" / "exporters"
    for path in (
        ROOT / "kdrecipe" / "measure" / "worker.py",
        exporters / "runtimes.py",
        exporters / "attention_runtime.py",
        ROOT / "kdrecipe" / "corpus" / "segments.py",
    ):
        found = [m for m in imports(path) if below(m, "torch", "lhotse", "kdrecipe")]
        assert [m for m in found if not below(m, "kdrecipe.corpus.segments")] == [], path
