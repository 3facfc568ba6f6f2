"""Commands about models: recognise with them, measure, compare and show them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kdrecipe.cli.recipe_commands import trust_option

_Function = TypeVar("_Function")


@click.command()
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
@trust_option
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


@click.command()
@click.argument("model", metavar="BUNDLE_OR_EXPORT")
@click.argument("audio", nargs=-1, type=click.Path(path_type=Path))
@_data_options("test")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this file (bench.json).")
@trust_option
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


@click.command()
@click.argument("items", nargs=-1, required=True, metavar="[NAME=]PATH...")
@_data_options("test")
@click.option("--out", type=click.Path(path_type=Path), help="A directory for compare.html and compare.json.")
@trust_option
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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), metavar="BUNDLE")
@_data_options("dev")
@click.option("--out", type=click.Path(path_type=Path), help="A directory for sensitivity.html and .json.")
@trust_option
def sensitivity(
    bundle: Path, data: Path | None, split: str, most: int | None, out: Path | None, trust_plugins: bool
) -> None:
    """Measure what int8, int4 and pruning of each layer cost and win.

    Without --data, on the manifests of the work directory that BUNDLE is in; on 32 utterances.
    """
    from kdrecipe.cli import sensitivity as pipeline

    pipeline.sensitivity(bundle, data=data, split=split, most=most, out=out, trust_plugins=trust_plugins)


@click.command()
@click.argument("items", nargs=-1, required=True, metavar="[NAME=]BUNDLE_OR_EXPORT...")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any free one."
)
@click.option("--variant", help="Of exports.  [default: int8 if there]")
@trust_option
def demo(items: tuple[str, ...], port: int, variant: str | None, trust_plugins: bool) -> None:
    """Serve a local page: speak or drop a file, and models recognise it side by side.

    The first is the one that the others are compared with. whisper:DIRECTORY is an imported model, by the
    name of its teacher plugin.
    """
    from kdrecipe.cli import demo as pipeline

    pipeline.demo(items, port=port, variant=variant, trust_plugins=trust_plugins)


COMMANDS = (transcribe, bench, compare, sensitivity, demo)
