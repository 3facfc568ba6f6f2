"""The command line. Imports nothing slow: every command imports what it needs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from kdrecipe import __version__
from kdrecipe.artifacts import disk_errors
from kdrecipe.cli import model_commands, recipe_commands
from kdrecipe.cli.plugins import new, plugins
from kdrecipe.errors import KdrecipeError, ParityError, TrainingError

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


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kdrecipe")
def cli() -> None:
    """Distil, shrink and export speech recognisers, by recipe.

    RECIPE is a directory, a recipe.yaml, or corpus/name below recipes/. Plugins may add commands:
    see kdrecipe plugins list.
    """


for _command in (*recipe_commands.COMMANDS, *model_commands.COMMANDS, plugins, new):
    cli.add_command(_command)


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
