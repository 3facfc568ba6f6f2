"""Fingerprints of code: what a plugin imports from its own package counts, wherever the import stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kdrecipe
from kdrecipe.plugin import source_code
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.plugin.registry import Source
from kdrecipe.plugin.source_code import core_hash, own_files, plugin_hash

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


def write(folder: Path, **files: str) -> Path:
    """``a__b="..."`` is written to ``a/b.py``."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stranger's package on the path: ``strangers_kd`` with a plugin two imports away from ``deep``."""
    root = tmp_path / "strangers_kd"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "losses").mkdir()
    (root / "losses" / "__init__.py").write_text("")
    write(
        root,
        losses__mine="def build():\n    from strangers_kd.maths import norm\n    return norm\n",
        maths="from . import deep\nnorm = deep.norm\n",
        deep="norm = 1\n",
        idle="x = 1\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source_code._package_folders.cache_clear()
    yield root
    source_code._package_folders.cache_clear()


def changed(plugin: Path, file: Path, text: str) -> bool:
    before = plugin_hash(plugin)
    file.write_text(text)
    return plugin_hash(plugin) != before


@pytest.mark.parametrize(
    ("kind", "name", "helper"),
    [
        ("architectures", "conformer", "architectures/layers.py"),
        ("exporters", "onnx_transducer", "exporters/onnx_graph.py"),
        ("exporters", "onnx_ctc", "exporters/shared.py"),
        ("exporters", "onnx_ctc", "exporters/runtimes.py"),
        ("metrics", "cer", "metrics/wer.py"),
        ("corpora", "voice_commands", "espeak.py"),
    ],
)
def test_shipped_plugins_cover_their_helpers(registry, kind, name, helper):
    covered = own_files(registry.source(kind, name).path)
    assert any(path.as_posix().endswith(helper) for path in covered), covered
    core = Path(kdrecipe.__file__).parent
    assert not [path for path in covered if path.is_relative_to(core)], "the core is nobody's own package"


def test_a_changed_helper_changes_the_fingerprint(package):
    source = Source("mine", "strangers", "1.0", package / "losses" / "mine.py")
    before = source.fingerprint()
    (package / "deep.py").write_text("norm = 2\n")
    assert source.fingerprint() != before


def test_imports_within_functions_and_through_others_are_followed(package):
    names = {path.relative_to(package).as_posix() for path in own_files(package / "losses" / "mine.py")}
    assert names == {"__init__.py", "losses/__init__.py", "losses/mine.py", "maths.py", "deep.py"}


@pytest.mark.parametrize(
    "statement",
    [
        "import strangers_kd.deep",
        "from strangers_kd import deep",
        "from ..deep import norm",
        "from .. import deep as d",
        "import importlib\nimportlib.import_module('strangers_kd.deep')",
        "if True:\n    from strangers_kd.deep import *",
        "start = 'strangers_kd.deep:norm'",
    ],
)
def test_every_way_to_import(package, statement):
    plugin = package / "losses" / "mine.py"
    plugin.write_text(statement + "\n")
    assert package / "deep.py" in own_files(plugin)
    assert changed(plugin, package / "deep.py", "norm = 3\n")


def test_a_file_in_the_same_folder_that_is_named_as_text_counts(tmp_path):
    """As the runtime of an exporter that is a file beside a recipe."""
    text = "from pathlib import Path\nstart = f\"{Path(__file__).with_name('my_runtime.py')}:start\"\n"
    write(tmp_path, plugin=text, my_runtime="x = 1\n")
    assert changed(tmp_path / "plugin.py", tmp_path / "my_runtime.py", "x = 2\n")


def test_comments_docstrings_and_strangers_do_not_count(package):
    plugin = package / "losses" / "mine.py"
    assert not changed(plugin, package / "deep.py", '"""Text."""\n\nnorm = 1  # as it was\n')
    assert not changed(plugin, package / "idle.py", "x = 2\n")


def test_a_file_beside_a_recipe_covers_the_modules_beside_it(tmp_path):
    write(tmp_path, plugin="def f():\n    import helper\n", helper="import more.deep\n", other="x = 1\n")
    write(tmp_path, more____init__="", more__deep="x = 1\n")
    plugin = tmp_path / "plugin.py"
    assert changed(plugin, tmp_path / "helper.py", "import more.deep\ny = 1\n")
    assert changed(plugin, tmp_path / "more" / "deep.py", "x = 2\n")
    assert not changed(plugin, tmp_path / "other.py", "x = 2\n")


def test_the_fingerprint_does_not_depend_on_the_place(package, tmp_path):
    here = plugin_hash(package / "losses" / "mine.py")
    beside = write(tmp_path / "one", plugin="import helper\n", helper="x = 1\n")
    moved = write(tmp_path / "two", plugin="import helper\n", helper="x = 1\n")
    assert plugin_hash(beside / "plugin.py") == plugin_hash(moved / "plugin.py") != here


def test_code_that_can_not_be_read_counts_by_its_bytes(package):
    plugin = package / "losses" / "mine.py"
    assert changed(plugin, package / "deep.py", "norm = = 2\n")
    assert changed(plugin, package / "deep.py", "norm = = 3\n")


def test_nothing_is_executed(package):
    (package / "deep.py").write_text("raise SystemExit('executed')\n")
    assert plugin_hash(package / "losses" / "mine.py")
    assert not [name for name in sys.modules if name.startswith("strangers_kd")]


def test_circles_end(package):
    (package / "deep.py").write_text("from strangers_kd import maths\n")
    assert package / "maths.py" in own_files(package / "losses" / "mine.py")


def test_the_core_has_a_hash_that_any_process_finds():
    assert len(core_hash()) == 16
    code = "from kdrecipe.plugin.source_code import core_hash; print(core_hash())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == core_hash()
