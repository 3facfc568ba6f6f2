"""Make every committed table again: each recipe's ``RESULTS.md``, by the command that it names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kdrecipe.errors import KdrecipeError, Problem, RecipeError, TrainingError
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.needed import missing

_COMMAND = re.compile(r"^## How this was made\n+```sh\n(kdrecipe run .+)\n```$", re.MULTILINE)
TRUST = "--trust-plugins"
RENDER = ["--stage", "score", "--force"]
"""Nothing is trained or decoded again: scores and report, from what lies in the work directory."""


def regenerate(
    recipes: Sequence[Path], *, work: Path | None = None, render: bool = False, dry_run: bool = False
) -> None:
    """Run recipes one after the other, each in a process of its own; one that fails stops no other.

    Args:
        recipes: directories with a ``RESULTS.md``.
        work: directory for all that is made, in a folder per recipe; None: ``exp`` in each.
        render: only stages 9 and 10, on what earlier runs left there.
        dry_run: only print the commands.

    Raises:
        RecipeError: what recipes need and this machine lacks, of all of them, before anything runs.
        TrainingError: recipes that failed.
    """
    commands = {recipe: command(recipe, work, render) for recipe in recipes}
    problems = [p for recipe in recipes for p in _lacking(recipe, work, render, TRUST in commands[recipe])]
    for words in commands.values():
        print(shlex.join(["kdrecipe", *words]), flush=True)
    if problems:
        raise RecipeError(problems)
    failed = []
    for recipe, words in commands.items() if not dry_run else ():
        print(f"\n== {_name(recipe)}", flush=True)
        if subprocess.run([sys.executable, "-m", "kdrecipe.cli", *words], check=False).returncode:
            failed.append(_name(recipe))
    if failed:
        raise TrainingError(
            f"failed: {', '.join(failed)} (messages above)", remedy="the same command resumes"
        )


def with_results(folder: Path) -> list[Path]:
    """Recipes below a folder ``recipes`` whose table is committed."""
    return sorted(path.parent for path in folder.glob("*/*/RESULTS.md"))


def command(recipe: Path, work: Path | None, render: bool) -> list[str]:
    """The words after ``kdrecipe`` of the command that a recipe's ``RESULTS.md`` names, for this machine.

    Raises:
        KdrecipeError: the file is not there, or names none.
    """
    path = recipe / "RESULTS.md"
    found = _COMMAND.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is None:
        raise KdrecipeError("no table with a command that makes it", where=str(path))
    _, run, _, *options = shlex.split(found[1])
    place = ["--work", str(work / _name(recipe))] if work else []
    return [run, str(recipe), *options, *place, *(RENDER if render else [])]


def _lacking(recipe: Path, work: Path | None, render: bool, trust: bool) -> list[Problem]:
    found = missing(load_recipe(recipe, trust_plugins=trust))
    lacking = [Problem(f"{_name(recipe)}: {p.what}", p.where, p.remedy) for p in found]
    place = work / _name(recipe) if work else recipe / "exp"
    if render and not (place / "scores").is_dir():
        what = f"{_name(recipe)}: nothing to render, {place} holds no finished run"
        lacking.append(Problem(what, remedy="run it without --render, or name the recipes to render"))
    return lacking


def _name(recipe: Path) -> str:
    return "/".join(recipe.resolve().parts[-2:])
