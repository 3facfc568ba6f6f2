"""docs/writing-a-loss.md, block by block: files are written, commands run, outputs compared."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdrecipe.cli.main import cli
from kdrecipe.recipe.load import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-loss.md"
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)\n```", re.DOTALL)


@dataclass
class Block:
    """A fenced block and the comment before it."""

    kind: str  # file, run, output; empty: prose only
    argument: str
    language: str
    code: str


def blocks():
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        kind, _, argument = (match["mark"] or "").replace(":", "").partition(" ")
        yield Block(kind, argument, match["language"], match["code"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(directory):
    for block in blocks():
        if block.kind == "file":
            (directory / block.argument).write_text(block.code + "\n", encoding="utf-8")


def test_commands_print_what_the_page_says(here):
    write_files(here)
    output, num_outputs = "", 0
    for block in blocks():
        if block.kind == "run":
            command = shlex.split(block.code)
            assert command[0] == "kdrecipe"
            result = CliRunner().invoke(cli, command[1:])
            assert (result.exit_code != 0) == (block.argument == "fails"), result.output
            output = result.output
        elif block.kind == "output":
            num_outputs += 1
            if block.argument == "part":
                assert block.code in output
            elif block.argument.startswith("files "):
                root = here / block.argument.split()[1]
                files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
                assert sorted(files) == sorted(block.code.split())
            else:
                assert output.strip() == block.code.strip()
    assert num_outputs == 4


def test_the_recipe_is_sound_and_finds_the_loss(here, monkeypatch):
    write_files(here)
    monkeypatch.setenv("CORPUS_ROOT", str(here))
    recipe = load_recipe(here / "recipe.yaml")
    assert "js" in recipe.plugins.registry.names("losses")
    assert [term.name for term in recipe.systems["kd_js"].terms] == ["ctc", "js"]


def pytest_in(directory, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_test_file_passes(here):
    write_files(here)
    done = pytest_in(here, "test_js.py")
    assert done.returncode == 0, done.stdout
    assert "21 passed" in done.stdout


def test_the_package_passes_its_own_test_with_the_loss_moved_in(here):
    assert CliRunner().invoke(cli, ["new", "plugin", "js_pair", "--kind", "loss"]).exit_code == 0
    package = here / "js_pair"
    plugin = next(b.code for b in blocks() if b.argument == "plugin.py")
    moved = plugin.replace("JensenShannon", "JsPair").replace('"js"', '"js_pair"')
    (package / "kdrecipe_js_pair.py").write_text(moved + "\n", encoding="utf-8")
    toml = next(b.code for b in blocks() if b.language == "toml")
    assert toml in (package / "pyproject.toml").read_text(encoding="utf-8")
    done = pytest_in(package)
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout


def test_the_table_lists_every_check():
    from kdrecipe.testing.contracts import LOSS_CHECKS

    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(LOSS_CHECKS)


def test_the_losses_of_the_guide_exist_with_the_options_it_names():
    from kdrecipe_plugins.losses.hidden import HiddenMse
    from kdrecipe_plugins.losses.kl import KlLoss

    guide = PAGE.with_name("which-loss.md").read_text(encoding="utf-8")
    for value in re.findall(r"`blank: (\w+)`", guide):
        KlLoss.Config(blank=value)
    for value in re.findall(r"`direction: (\w+)`", guide):
        KlLoss.Config(direction=value)
    assert "`normalise: true`" in guide
    assert "normalise" in HiddenMse.Config.model_fields
