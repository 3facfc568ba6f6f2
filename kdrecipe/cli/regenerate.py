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
RENDER = ["--stage", "score", "--force"]
"""Only scores and report, from the work directory: nothing is trained or decoded again."""
TRUST = "--trust-plugins"


def regenerate(
    recipes: Sequence[Path],
    *,
    work: Path | None = None,
    render: bool = False,
    dry_run: bool = False,
    trust_plugins: bool = False,
) -> None:
    """Run recipes one after the other, each in its own process; if one fails, the others still run.

    Args:
        recipes: directories with a ``RESULTS.md``.
        work: directory for all results, with a folder per recipe; None: ``exp`` in each recipe.
        render: only stages 9 and 10, from the output of earlier runs there.
        dry_run: only print the commands.
        trust_plugins: run the plugin files of imported bundles; that a table was made so is no consent.

    Raises:
        RecipeError: what the recipes need and this machine lacks, listed for all before anything runs.
        TrainingError: recipes that failed.
    """
    more = [TRUST] if trust_plugins else []
    commands = {recipe: [*command(recipe, work, render), *more] for recipe in recipes}
    problems = [p for recipe in recipes for p in _lacking(recipe, work, render, trust_plugins)]
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
    """Recipes in a folder ``recipes`` that have a table."""
    return sorted(path.parent for path in folder.glob("*/*/RESULTS.md"))


def command(recipe: Path, work: Path | None, render: bool) -> list[str]:
    """The command that a recipe's ``RESULTS.md`` names, for this machine: its words after ``kdrecipe``.

    Raises:
        KdrecipeError: there is no such file, or it names no command.
    """
    path = recipe / "RESULTS.md"
    found = _COMMAND.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if found is None:
        raise KdrecipeError("no table with a command that makes it", where=str(path))
    _, run, _, *options = shlex.split(found[1])
    place = ["--work", str(work / _name(recipe))] if work else []
    options = [word for word in options if word != TRUST]
    return [run, str(recipe), *options, *place, *(RENDER if render else [])]


def _lacking(recipe: Path, work: Path | None, render: bool, trust_plugins: bool) -> list[Problem]:
    found = missing(load_recipe(recipe, trust_plugins=trust_plugins))
    lacking = [Problem(f"{_name(recipe)}: {p.what}", p.where, p.remedy) for p in found]
    place = work / _name(recipe) if work else recipe / "exp"
    if render and not (place / "scores").is_dir():
        what = f"{_name(recipe)}: nothing to render, there is no finished run in {place}"
        lacking.append(Problem(what, remedy="run it without --render, or name the recipes to render"))
    return lacking


def _name(recipe: Path) -> str:
    return "/".join(recipe.resolve().parts[-2:])
