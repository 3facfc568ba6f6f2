"""The command line. Imports nothing slow: every command imports what it needs."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdrecipe import __version__
from kdrecipe.artifacts import disk_errors
from kdrecipe.cli.plugins import new, plugins
from kdrecipe.errors import KdrecipeError, ParityError, Problem, RecipeError, TrainingError, did_you_mean
from kdrecipe.stages import STAGES

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe
    from kdrecipe.recipe.sections import Learnt

_Function = TypeVar("_Function")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Cli(click.Group):
    """The core's commands; plugins are loaded only for a command that is none of them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is not None or cmd_name.startswith("-"):
            return found
        from kdrecipe.plugin.loader import load_plugins

        registry = load_plugins().registry
        problem = registry.problem("commands", cmd_name)
        if problem is not None:
            raise click.UsageError(f"{problem.what}; {problem.remedy}", ctx)
        command: click.Command = registry.get("commands", cmd_name)
        return command


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


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdrecipe")
def cli() -> None:
    """Distil, shrink and export speech recognisers, by recipe.

    RECIPE is a directory, a recipe.yaml, or corpus/name below recipes/. Plugins may add commands:
    see kdrecipe plugins list.
    """


def _trust_option(function: Any) -> Any:
    return click.option(
        "--trust-plugins", is_flag=True, help="Run the Python code that a bundle brings. Read it first."
    )(function)


def _recipe_options(function: Any) -> Any:
    function = _trust_option(function)
    function = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, dotted key."
    )(function)
    function = click.option(
        "--profile", help="Merge in one of the recipe's profiles; every recipe has tiny."
    )(function)
    return click.argument("recipe", default=".", metavar="[RECIPE]")(function)


@cli.command()
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


@cli.command()
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


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="BUNDLE_OR_EXPORT")
@click.argument("audio", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--decoder", help="The search, for bundles.  [default: greedy, of the model's first head]")
@click.option("--variant", help="Of an export: fp32, fp16, int8, int8_qdq, int4.  [default: int8 if there]")
@click.option("--channel", type=click.IntRange(min=0), help="To listen to.  [default: the average of all]")
@click.option(
    "--longest",
    "longest_s",
    type=click.FloatRange(min=1),
    default=30.0,
    metavar="SECONDS",
    help="Cut longer audio where it is quietest.  [default: 30]",
)
@_trust_option
def transcribe(
    model: Path,
    audio: tuple[Path, ...],
    decoder: str | None,
    variant: str | None,
    channel: int | None,
    longest_s: float,
    trust_plugins: bool,
) -> None:
    """Recognise audio files of any length and say when each word starts."""
    from kdrecipe.cli import transcribe as pipeline

    pipeline.transcribe(
        model,
        audio,
        decoder=decoder,
        variant=variant,
        channel=channel,
        longest_s=longest_s,
        trust_plugins=trust_plugins,
    )


def _data_options(default_split: str) -> Callable[[_Function], _Function]:
    """Options that name utterances with transcripts."""

    def add(function: Any) -> Any:
        function = click.option(
            "--utterances", "most", type=click.IntRange(min=1), help="At most so many, drawn at random."
        )(function)
        function = click.option(
            "--split", default=default_split, show_default=True, help="The split of --data."
        )(function)
        return click.option(
            "--data",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Lhotse manifests, or a recipe's work directory.",
        )(function)

    return add


@cli.command()
@click.argument("model", metavar="BUNDLE_OR_EXPORT")
@click.argument("audio", nargs=-1, type=click.Path(path_type=Path))
@_data_options("test")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this file (bench.json).")
@_trust_option
def bench(
    model: str,
    audio: tuple[Path, ...],
    data: Path | None,
    split: str,
    most: int | None,
    out: Path | None,
    trust_plugins: bool,
) -> None:
    """Measure size, work, speed and memory of a model in its runtime.

    On AUDIO, on a split of --data (then with word errors), or on synthetic utterances.
    """
    from kdrecipe.cli import bench as pipeline

    pipeline.bench(model, audio, data=data, split=split, most=most, out=out, trust_plugins=trust_plugins)


@cli.command()
@click.argument("items", nargs=-1, required=True, metavar="[NAME=]PATH...")
@_data_options("test")
@click.option("--out", type=click.Path(path_type=Path), help="A directory for compare.html and compare.json.")
@_trust_option
def compare(
    items: tuple[str, ...],
    data: Path | None,
    split: str,
    most: int | None,
    out: Path | None,
    trust_plugins: bool,
) -> None:
    """Compare bundles, exports, bench.json files or transcripts (test.jsonl) on one test set."""
    from kdrecipe.cli import compare as pipeline

    pipeline.compare(items, data=data, split=split, most=most, out=out, trust_plugins=trust_plugins)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path), metavar="BUNDLE")
@_data_options("dev")
@click.option("--out", type=click.Path(path_type=Path), help="A directory for sensitivity.html and .json.")
@_trust_option
def sensitivity(
    bundle: Path, data: Path | None, split: str, most: int | None, out: Path | None, trust_plugins: bool
) -> None:
    """Measure what int8, int4 and pruning of each layer cost and win.

    Without --data, on the manifests of the work directory that BUNDLE is in; on 32 utterances.
    """
    from kdrecipe.cli import sensitivity as pipeline

    pipeline.sensitivity(bundle, data=data, split=split, most=most, out=out, trust_plugins=trust_plugins)


@cli.command()
@click.argument("items", nargs=-1, required=True, metavar="[NAME=]BUNDLE_OR_EXPORT...")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any free one."
)
@click.option("--variant", help="Of exports.  [default: int8 if there]")
@_trust_option
def demo(items: tuple[str, ...], port: int, variant: str | None, trust_plugins: bool) -> None:
    """Serve a local page: speak or drop a file, and models recognise it side by side.

    The first is the one that the others are compared with. whisper:DIRECTORY is an imported model, by the
    name of its teacher plugin.
    """
    from kdrecipe.cli import demo as pipeline

    pipeline.demo(items, port=port, variant=variant, trust_plugins=trust_plugins)


@cli.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Where runs go, a folder per recipe.  [default: its exp]",
)
@click.option("--render", is_flag=True, help="Only score and report what earlier runs left there.")
@click.option("--dry-run", is_flag=True, help="Only print the commands.")
@_trust_option
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


@cli.command()
@click.argument("work", type=click.Path(path_type=Path), metavar="EXP")
def status(work: Path) -> None:
    """Say what of a run is where, how far, how fast, and until when. EXP is its work directory."""
    from kdrecipe.cli.status import status as tell

    tell(work)


@cli.command()
def stages() -> None:
    """Print the stage table, the same for every recipe."""
    for number, (verb, purpose) in enumerate(STAGES):
        click.echo(f"{number:2d}  {verb:9s} {purpose}")


cli.add_command(plugins)
cli.add_command(new)


# ---------------------------------------------------------------- recipes


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


# ---------------------------------------------------------------- entry point


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: done; 2: the input is wrong; 1: the work failed; 130: interrupted. A traceback is a bug.
    """
    # Read when torch loads, here and in every process that is started from here: threads that wait sleep
    # instead of taking cores from other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with disk_errors(Path.cwd()):
            status = cli.main(args=argv, prog_name="kdrecipe", standalone_mode=False)
    except KdrecipeError as error:
        return _told(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("kdrecipe: interrupted; the same command resumes from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has stopped (| head); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, SystemExit) as error:
        from kdrecipe.plugin.blame import blamed, strangers

        blame = blamed(error)
        if blame is not None:
            blame.__cause__ = error
            return _told(blame)
        if suspects := strangers():
            hint = "a bug of kdrecipe, or a plugin that does not keep to its interface"
            print(f"kdrecipe: {hint}: see kdrecipe plugins test for {', '.join(suspects)}", file=sys.stderr)
        raise
    return status if isinstance(status, int) else 0


def _told(error: KdrecipeError) -> int:
    """Print an error for the person who caused it; returns the exit status."""
    sys.stdout.flush()
    if error.__cause__ is not None and os.environ.get("KDRECIPE_TRACE", "") not in ("", "0"):
        traceback.print_exception(error.__cause__)
    number = len(error.problems)
    head = f"kdrecipe: {number} problems\n" if number > 1 else "kdrecipe: "
    print(f"{head}{error}", file=sys.stderr)
    return EXIT_FAILED if isinstance(error, (TrainingError, ParityError)) else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
