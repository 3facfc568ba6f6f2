"""Commands about recipes: run and check them, make their tables again, see how far a run is."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdrecipe.errors import Problem, RecipeError, did_you_mean
from kdrecipe.stages import STAGES

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe
    from kdrecipe.recipe.sections import Learnt


class _Stage(click.ParamType):
    """A stage by number or verb."""

    name = "stage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        verbs = [verb for verb, _ in STAGES]
        text = str(value)
        if text in verbs:
            return verbs.index(text)
        if text.isdecimal() and int(text) < len(verbs):
            return int(text)
        self.fail(f"{text!r} is no stage, 0 to {len(verbs) - 1}; {did_you_mean(text, verbs)}", param, ctx)


def trust_option(function: Any) -> Any:
    """The option ``--trust-plugins``."""
    return click.option(
        "--trust-plugins", is_flag=True, help="Run the Python code that a bundle brings. Read it first."
    )(function)


def _recipe_options(function: Any) -> Any:
    function = trust_option(function)
    function = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, dotted key."
    )(function)
    function = click.option(
        "--profile", help="Merge in one of the recipe's profiles; every recipe has tiny."
    )(function)
    return click.argument("recipe", default=".", metavar="[RECIPE]")(function)


@click.command()
@_recipe_options
@click.option("--stage", "first", type=_Stage(), default=0, help="First stage, by number or verb.")
@click.option("--stop-stage", "last", type=_Stage(), default=len(STAGES) - 1, help="Last stage, included.")
@click.option("--dry-run", is_flag=True, help="Only say what would run, and why.")
@click.option("--force", is_flag=True, help="Run even what is up to date.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes side by side.  [default: by machine]")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where results go.  [default: RECIPE/exp, or exp-PROFILE]"
)
@click.option(
    "--executor",
    metavar="NAME|FILE",
    help="Where jobs run: local, slurm, dask, or a YAML file.  [default: local]",
)
@click.option(
    "--trials", "with_trials", is_flag=True, help="Compare each system with its trials, on dev alone."
)
@click.option("--job", hidden=True, help="Run this one job: how side-by-side processes are started.")
def run(
    recipe: str,
    profile: str | None,
    overrides: tuple[str, ...],
    trust_plugins: bool,
    first: int,
    last: int,
    dry_run: bool,
    force: bool,
    jobs: int | None,
    work: Path | None,
    executor: str | None,
    with_trials: bool,
    job: str | None,
) -> None:
    """Run the stages of a recipe; what is up to date is skipped."""
    if first > last:
        raise click.UsageError(f"--stage {first} comes after --stop-stage {last}")

    from kdrecipe.recipe.executor import load_executor, split_overrides

    of_recipe, of_executor = split_overrides(overrides)
    place = load_executor(executor or "local", of_executor)

    def load() -> tuple[Recipe, Recipe | None]:
        def one(with_trials: bool) -> Recipe:
            return _load(recipe, of_recipe, profile, trust_plugins, with_trials=with_trials)

        return one(False), one(True) if with_trials else None

    from kdrecipe.stages.run import planned, run_recipe

    team = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # under torchrun
        if jobs is not None or executor is not None:
            raise click.UsageError("--jobs and --executor spread jobs; under torchrun, all train one model")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns where all parameters are used
        from kdrecipe.stages.team import Team

        team = Team()
        if not team.leads:
            team.follow(lambda: planned(*load(), work)[1].jobs)
            return
    loaded, tried = load()
    run_recipe(
        loaded,
        first,
        last,
        dry_run=dry_run,
        force=force,
        jobs=jobs,
        work=work,
        job=job,
        program=(sys.executable, "-m", "kdrecipe.cli"),
        team=team,
        executor=place,
        tried=tried,
    )
    if team:
        team.dismiss()


@click.command()
@_recipe_options
def check(recipe: str, profile: str | None, overrides: tuple[str, ...], trust_plugins: bool) -> None:
    """Find every mistake in a recipe, in its profiles too, without running anything."""
    loaded = _load(recipe, overrides, profile, trust_plugins)
    from kdrecipe.recipe import tiny
    from kdrecipe.recipe.load import load_recipe

    problems: list[Problem] = []
    sound: list[str] = []
    for other in dict.fromkeys([*loaded.profiles, tiny.NAME]) if profile is None else ():
        try:
            load_recipe(loaded.path, overrides=overrides, profile=other, trust_plugins=trust_plugins)
            sound.append(other)
        except RecipeError as error:
            if other in loaded.profiles:
                problems += [Problem(f"profile {other}: {p.what}", p.where, p.remedy) for p in error.problems]
            else:  # the rule does not fit; that is no mistake of the recipe
                click.echo(f"  {tiny.WHERE} does not work: {error.problems[0].what}")
                click.echo(
                    "  to make it work: profiles: {tiny: {...}}, which is put over what the rule gives"
                )
    if loaded.trials and not problems:
        load_recipe(
            loaded.path, overrides=overrides, profile=profile, trust_plugins=trust_plugins, with_trials=True
        )
    if problems:
        raise RecipeError(problems)
    _summary(loaded, sound)


def _summary(recipe: Recipe, profiles: Sequence[str]) -> None:
    from kdrecipe.recipe.trials import unequal
    from kdrecipe.stages.needed import missing

    teachers = recipe.teaching()
    for name in recipe.build_order():
        system = recipe.systems[name]
        stage = 3 if name in teachers else 6 if system.kind == "compressed" else 5
        seeds = " ".join(map(str, system.seeds))
        needs = f"from {', '.join(system.needs)}" if system.needs else ""
        click.echo(f"  {name:20s} {system.kind:10s} stage {stage}, seeds {seeds:10s} {needs}".rstrip())
    trimmed = f"of {recipe.tokens.teacher}, " if recipe.tokens.teacher else ""
    click.echo(f"  tokens {trimmed}from {_texts(recipe.tokens)}")
    if recipe.lm is not None and recipe.lm.text is None:
        click.echo(f"  language model from {_texts(recipe.lm)}")
    if recipe.trials:
        count = Counter(trial.of for trial in recipe.trials)
        click.echo(f"  {len(recipe.trials)} trials of {len(count)} systems")
        if note := unequal(recipe.trials, recipe.systems):
            click.echo(f"  {note}")
    for problem in missing(recipe):
        where = f" ({problem.where})" if problem.where else ""
        remedy = f": {problem.remedy}" if problem.remedy else ""
        click.echo(f"  to run it: {problem.what}{where}{remedy}")
    also = f", also with --profile {', '.join(profiles)}" if profiles else ""
    click.echo(f"{recipe.name}: no mistakes found{also}")


def _texts(learnt: Learnt) -> str:
    if learnt.labels is not None:
        return f"hypotheses of {learnt.labels}"
    return f"the transcripts of the subset {learnt.data}" if learnt.data else "all training transcripts"


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where runs go, a folder per recipe.  [default: its exp]",
)
@click.option("--render", is_flag=True, help="Only score and report what earlier runs left there.")
@click.option("--dry-run", is_flag=True, help="Only print the commands.")
@trust_option
def regenerate(
    recipes: tuple[str, ...], work: Path | None, render: bool, dry_run: bool, trust_plugins: bool
) -> None:
    """Make committed tables again: all, or those of RECIPE.

    Each RESULTS.md names the command that made it; that command is run, and writes it anew.
    """
    from kdrecipe.cli import regenerate as command

    named = [find_recipe(text).parent for text in recipes]
    found = named or [recipe for folder in _recipe_folders()[:1] for recipe in command.with_results(folder)]
    if not found:
        raise RecipeError("there is no recipe with a RESULTS.md", remedy="call it where recipes/ lies")
    command.regenerate(found, work=work, render=render, dry_run=dry_run, trust_plugins=trust_plugins)


@click.command()
@click.argument("work", type=click.Path(path_type=Path), metavar="EXP")
def status(work: Path) -> None:
    """Say what of a run is where, how far, how fast, and until when. EXP is its work directory."""
    from kdrecipe.cli.status import status as tell

    tell(work)


@click.command()
def stages() -> None:
    """Print the stage table, the same for every recipe."""
    for number, (verb, purpose) in enumerate(STAGES):
        click.echo(f"{number:2d}  {verb:9s} {purpose}")


# ---------------------------------------------------------------- what RECIPE means


def _load(
    text: str,
    overrides: Sequence[str],
    profile: str | None,
    trust_plugins: bool,
    *,
    with_trials: bool = False,
) -> Recipe:
    path = find_recipe(text)
    from kdrecipe.recipe.load import load_recipe

    return load_recipe(
        path,
        overrides=overrides,
        profile=profile,
        trust_plugins=trust_plugins,
        with_trials=with_trials,
    )


def _recipe_folders() -> list[Path]:
    """Folders ``recipes`` to look into: the working directory's, then this repository's."""
    folders = (Path.cwd() / "recipes", Path(__file__).resolve().parents[2] / "recipes")
    return [folder for folder in folders if folder.is_dir()]


def find_recipe(text: str) -> Path:
    """The ``recipe.yaml`` that ``text`` means: a file, a directory, or ``corpus/name``.

    Raises:
        RecipeError: there is none; the remedy names the closest known recipe.
    """
    path = Path(text)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    folders = _recipe_folders()
    for folder in folders:
        if (folder / text / "recipe.yaml").is_file():
            return folder / text / "recipe.yaml"
    known = {
        "/".join(found.parent.parts[-2:]) for folder in folders for found in folder.glob("*/*/recipe.yaml")
    }
    if text == ".":
        raise RecipeError("there is no recipe.yaml in this directory", remedy=did_you_mean("", known))
    what = f"there is no recipe.yaml in {text!r}" if path.is_dir() else f"there is no recipe {text!r}"
    raise RecipeError(what, remedy=did_you_mean(text, known))


COMMANDS = (run, check, regenerate, status, stages)
