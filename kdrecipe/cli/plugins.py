"""``kdrecipe plugins`` and ``kdrecipe new``: look at plugins, test them, begin one."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from kdrecipe.cli.scaffold import TEMPLATES, write_plugin
from kdrecipe.errors import PluginError, did_you_mean
from kdrecipe.interfaces import Options
from kdrecipe.plugin.registry import KINDS
from kdrecipe.recipe.yaml import parse_value

if TYPE_CHECKING:
    from kdrecipe.plugin.loader import Plugins

_FILES = click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Load a local plugin file as well.",
)
_KIND = click.option("--kind", type=click.Choice(sorted(KINDS.values())), help="Where a name has several.")


@click.group()
def plugins() -> None:
    """Look at plugins and test them."""


@plugins.command("list")
@_FILES
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_plugins(files: tuple[Path, ...], as_json: bool) -> None:
    """List what recipes can name, by kind, and what could not be loaded."""
    loaded = _load(files)
    registry = loaded.registry
    if as_json:
        names = {
            kind: {name: str(registry.source(kind, name)) for name in registry.names(kind)} for kind in KINDS
        }
        hooks = {name: loaded.hooks_of(name) for name in loaded.sources}
        click.echo(json.dumps({"plugins": names, "hooks": hooks, "broken": loaded.broken}, indent=2))
        return
    for kind in KINDS:
        for name in registry.names(kind):
            if registry.get(kind, name) is not None:  # None: a command of the core
                click.echo(f"{kind:14s} {name:18s} {registry.source(kind, name)}")
    for name, reason in loaded.broken.items():
        click.echo(f"{'not loaded':14s} {name:18s} {reason}")


@plugins.command()
@click.argument("name")
@_KIND
@_FILES
def show(name: str, kind: str | None, files: tuple[Path, ...]) -> None:
    """Show a plugin: what it does, its options, where it comes from."""
    loaded = _load(files)
    registry = loaded.registry
    for plural in _kinds_of(loaded, name, kind):
        cls = registry.get(plural, name)
        click.echo(f"{KINDS[plural]} {name}: {registry.source(plural, name)}")
        if plural == "commands":
            continue
        click.echo(f"\n{inspect.getdoc(cls) or 'not documented'}\n")
        config: Any = cls.Config
        for field_name, field in config.model_fields.items():
            default = "required" if field.is_required() else f"default {field.get_default()!r}"
            click.echo(f"  {field.alias or field_name}: {_type_text(field.annotation)} ({default})")
        for text in _option_texts(config):
            click.echo(f"\n{text}")


def _option_texts(config: Any) -> list[str]:
    """What is said of the options: of a plugin's own, then of those it shares with others."""
    if not config.model_fields:
        return []
    classes = [cls for cls in config.__mro__ if issubclass(cls, Options) and cls is not Options]
    return [inspect.cleandoc(cls.__doc__) for cls in classes if cls.__doc__]


def _type_text(annotation: Any) -> str:
    """``int``, ``int | None``, ``'keep' | 'drop'``: a type as a person writes it."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


@plugins.command()
@_FILES
def doctor(files: tuple[Path, ...]) -> None:
    """Say what is wrong with the installed plugins; exit status 1 if anything is."""
    loaded = _load(files)
    for variable in ("KDRECIPE_PLUGINS", "KDRECIPE_TRACE"):
        if variable in os.environ:
            click.echo(f"{variable}={os.environ[variable]}")
    for name, reason in loaded.broken.items():
        click.echo(f"{name}: could not be loaded: {reason}")
    for conflict in loaded.registry.conflicts():
        click.echo(str(conflict))
    click.echo(f"{len(loaded.sources)} plugins loaded, {len(loaded.broken)} not")
    if loaded.broken or loaded.registry.conflicts():
        click.get_current_context().exit(1)


@plugins.command("test")
@click.argument("name")
@_KIND
@_FILES
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option to test it with, as a recipe has it, in place of its contract_options.",
)
@click.option("--verbose", is_flag=True, help="Say what each check demands.")
def test_plugin(
    name: str, kind: str | None, files: tuple[Path, ...], options: tuple[str, ...], verbose: bool
) -> None:
    """Run the contract checks on a plugin; exit status 1 if one fails."""
    loaded = _load(files)
    kinds = _kinds_of(loaded, name, kind)
    from kdrecipe.testing.contracts import test_plugin as run_contract

    num_failed = 0
    for plural in kinds:
        click.echo(f"{KINDS[plural]} {name}:")
        results = run_contract(loaded.registry, plural, name, _options(options))
        for result in results:
            reason = f": {result.reason}" if result.reason else ""
            click.echo(f"  {result.status:8s} {result.check_id}{reason}")
            if result.doc and (verbose or not result.ok):
                click.echo(f"           demanded: {result.doc}")
        failed = [result for result in results if not result.ok]
        num_failed += len(failed)
        click.echo(f"  {len(results)} checks, {len(failed)} failed")
    if num_failed:
        click.get_current_context().exit(1)


def _load(files: tuple[Path, ...]) -> Plugins:
    from kdrecipe.plugin.loader import load_plugins

    return load_plugins(files)


def _kinds_of(loaded: Plugins, name: str, kind: str | None) -> list[str]:
    """Kinds in which ``name`` is registered."""
    registry = loaded.registry
    kinds = [k for k in KINDS if kind in (None, KINDS[k])]
    found = [k for k in kinds if name in registry.names(k)]
    if not found:
        if name in loaded.broken:
            raise PluginError(f"the plugin {name!r} could not be loaded: {loaded.broken[name]}")
        known = [n for k in kinds for n in registry.names(k) if k != "commands"]
        raise PluginError(f"no plugin is called {name!r}", remedy=did_you_mean(name, known))
    return found


def _options(given: tuple[str, ...]) -> dict[str, Any] | None:
    """``KEY=VALUE``, the value as YAML reads it; None if there are none."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise PluginError(f"--option {text}: no value", remedy="write --option KEY=VALUE")
        found[key] = parse_value(value, f"--option {key}")
    return found or None


@click.group()
def new() -> None:
    """Begin something of your own."""


@new.command("plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(sorted(TEMPLATES)), default="loss", show_default=True)
@click.option(
    "--dir",
    "parent",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="Directory to make it in.  [default: here]",
)
def new_plugin(name: str, kind: str, parent: Path) -> None:
    """Write a small plugin package NAME, with a contract test that passes."""
    path = write_plugin(name, kind, parent)
    click.echo(
        f"{path} written. Next:\n  pip install -e {path}\n  pytest {path}\n  kdrecipe plugins show {name}"
    )
