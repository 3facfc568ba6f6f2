"""What a project has besides its code: Makefile, hooks, workflows, changelog, citation, contributing."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrecipe import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> Any:
    # All scalars as text: "3.10" is no number, and "on" no truth value.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


# ---------------------------------------------------------------- the Makefile


def targets() -> list[str]:
    return re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE)


def named_in(*names: str) -> set[str]:
    """Targets that documents call: ``make X`` in code."""
    text = "\n".join(map(text_of, names))
    return set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))


def test_targets_have_a_line_of_help_and_are_phony():
    phony = re.search(r"^\.PHONY: (.*)$", text_of("Makefile"), re.MULTILINE)[1].split()
    assert phony == targets()
    assert re.findall(r"^([a-z]+):  ## \S", text_of("Makefile"), re.MULTILINE) == targets()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", targets())
def test_a_target_calls_what_is_there(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = re.findall(r"(?<![\w./-])((?:tests|docs|recipes|benchmarks|local)/[\w./-]+)", done.stdout)
    modules = re.findall(r"-m (\w+)", done.stdout)
    assert called or modules or target == "help"
    for name in called:
        assert (ROOT / name).exists(), name
        if done.stdout.startswith(name):
            assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_documents_name_targets_that_are_there():
    assert named_in("CONTRIBUTING.md") >= {"help", "quick", "test", "lint", "types", "docs", "readme"}
    assert named_in("CONTRIBUTING.md", "README.md", "CHANGELOG.md") <= set(targets())


# ---------------------------------------------------------------- hooks and workflows


def test_the_hooks_call_targets_and_need_no_network():
    config = parsed(ROOT / ".pre-commit-config.yaml")
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["pass_filenames"] == "false"
        program, target = hook["entry"].split()
        assert program == "make"
        assert target in targets()


def test_there_is_a_workflow():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_call_scripts_that_are_there(path):
    jobs = parsed(path)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all("runs-on" in job and "timeout-minutes" in job for job in jobs.values())
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        # Inputs of an action are texts; a list would be refused.
        assert all(isinstance(value, str) for value in step.get("with", {}).values())
        assert step.get("uses", "actions/").startswith("actions/"), "only GitHub's own actions"
    for command in [step["run"] for step in steps if "run" in step]:
        first, second = command.split()[:2] if " " in command else (command, "")
        if first == "make":
            assert second in targets()
        elif first != "python":
            assert os.access(ROOT / first, os.X_OK), first
    assert "://" not in path.read_text(encoding="utf-8")


def test_the_workflow_tries_every_python_that_the_package_admits():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", setup["options"]["python_requires"]).groups())
    tried = parsed(ROOT / ".github/workflows/tests.yml")["jobs"]["quick"]["strategy"]["matrix"]["python"]
    assert tried == [f"3.{minor}" for minor in range(low, high)]


# ---------------------------------------------------------------- citation and changelog


def test_the_citation_is_complete():
    """What cff-version 1.2.0 requires, and the version of the code."""
    cff = parsed(ROOT / "CITATION.cff")
    assert cff["cff-version"] == "1.2.0"
    assert cff["type"] == "software"
    assert cff["version"] == __version__
    assert all(cff[key] for key in ("message", "title", "authors", "license"))
    assert all(set(author) == {"name"} for author in cff["authors"])  # entities


def test_the_changelog_has_this_version_below_what_is_to_come():
    versions = re.findall(r"^## \[([^\]]+)\]", text_of("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert __version__ in versions
    kinds = set(re.findall(r"^### (.*)$", text_of("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def moved(kind: str) -> list[tuple[str, str]]:
    """Old and new module of each row of the table under ``kind``."""
    part = text_of("CHANGELOG.md").split("## [Unreleased]")[1].split("\n## ")[0]
    part = part.split(f"### {kind}\n")[1].split("\n### ")[0]
    found = []
    for old_cell, new_cell in re.findall(r"^  \| (`kdrecipe.*?) \| (.*) \|$", part, re.MULTILINE):
        old, new = in_full(old_cell), in_full(new_cell)
        found += zip(old, new if len(old) == len(new) else new[:1] * len(old), strict=True)
    return found


def in_full(cell: str) -> list[str]:
    """The modules of a cell; ``.name`` is beside the first."""
    names = re.findall(r"`([\w.]+)`", cell)
    beside = names[0].rpartition(".")[0]
    return [beside + name if name.startswith(".") else name for name in names]


@pytest.mark.parametrize("kind", ["Changed", "Deprecated"])
def test_the_changelog_says_where_modules_are(kind):
    assert moved(kind)
    for old, new in moved(kind):
        assert importlib.util.find_spec(new) is not None, (old, new)


def test_deprecated_names_still_work_and_warn():
    for name, _ in moved("Deprecated"):
        done = subprocess.run(
            [sys.executable, "-W", "always", "-c", f"import {name}"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"{name} has moved" in done.stderr


# ---------------------------------------------------------------- contributing


def test_the_order_of_imports_is_the_test_s():
    spec = importlib.util.spec_from_file_location("quality", ROOT / "tests" / "unit" / "test_quality.py")
    quality = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quality)
    rows = re.findall(r"^\| (\d+) \| (`.*`) \|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    written = {int(number): tuple(re.findall(r"`(\w+)`", names)) for number, names in rows}
    assert written == dict(enumerate(quality.FLOORS, start=1))
