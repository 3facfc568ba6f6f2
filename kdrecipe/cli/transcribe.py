"""Recognise audio files with a bundle or an export, and say when each word starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from kdrecipe.corpus.audio import open_audio, recognise_long
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.errors import DataError, KdrecipeError, Problem
from kdrecipe.interfaces import Hypothesis
from kdrecipe.recipe.sections import Named
from kdrecipe.text import WORD_START


class Recogniser(Protocol):
    """A bundle or an export, loaded."""

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate, samples in [-1, 1]."""


def transcribe(
    path: Path | str,
    audio_files: Sequence[Path | str],
    *,
    decoder: str | None = None,
    variant: str | None = None,
    channel: int | None = None,
    longest_s: float = LONGEST_S,
    trust_plugins: bool = False,
) -> list[Hypothesis]:
    """Recognise files and print, per file, the text and the start of each word and token.

    Args:
        path: a bundle's directory, an export's directory, or an ``.onnx`` or ``.pt`` file of one.
        audio_files: of any length and sampling rate, read by libsndfile.
        decoder: the search, for bundles (exports bring their runtime's own); None: the greedy one of
            the model's first head.
        variant: ``fp32``, ``int8``, ... of an export's directory; None: the last of the exporter's that is
            there.
        channel: the one to listen to, from 0; None: the average of all.
        longest_s: audio that is longer is recognised in pieces, cut where it is quietest; 1 or more.
        trust_plugins: run the plugin files that a bundle brings.

    Returns:
        What was recognised, file by file.

    Raises:
        KdrecipeError: ``path`` is nothing to recognise with, or an export that a ``decoder`` is given for.
        DataError: audio can't be read, or has samples that are no numbers; the files before it have been
            printed.
    """
    # All files are looked at first: better than stopping at the tenth of them.
    missing = [Problem("there is no such file", str(f)) for f in audio_files if not Path(f).is_file()]
    if missing:
        raise DataError(missing)
    runner, pieces = open_runner(Path(path), decoder=decoder, variant=variant, trust_plugins=trust_plugins)
    # Runners cut by themselves, unless told otherwise, what is longer than they should hear at once.
    recognise: Callable[[np.ndarray, int], Hypothesis] = runner.transcribe
    if longest_s > LONGEST_S:
        recognise = partial(runner.transcribe, longest_s=longest_s)
    hypotheses = []
    for number, file in enumerate(audio_files):
        sample_rate, blocks = open_audio(file, channel)
        hypothesis = recognise_long(recognise, blocks, sample_rate, longest_s)
        if number:
            print()
        print(show(str(file), hypothesis, pieces))
        hypotheses.append(hypothesis)
    return hypotheses


def open_runner(
    path: Path, *, decoder: str | None = None, variant: str | None = None, trust_plugins: bool = False
) -> tuple[Recogniser, list[str]]:
    """What recognises, and its tokens by id; arguments as of :func:`transcribe`."""
    from kdrecipe.data.tokens import read_pieces

    if (path / "bundle.json").exists():
        runner = BundleRunner(path, decoder, trust_plugins=trust_plugins)
        return runner, runner.pieces
    opened = _open_export(path, variant)
    if opened is None:
        wanted = "an export" if variant is None else f"an export in {variant}"
        raise KdrecipeError(
            f"there is neither a bundle (bundle.json) nor {wanted}",
            where=str(path),
            remedy="give exp/systems/<system>/seed<k>, exp/exports/<system>/seed<k>/<exporter>, or a file",
        )
    if decoder is not None:
        raise KdrecipeError(
            f"an export is recognised by its runtime's own search, not by {decoder}",
            where=str(path),
            remedy="leave out --decoder, or give the bundle, exp/systems/<system>/seed<k>",
        )
    return opened, read_pieces((path if path.is_dir() else path.parent) / "tokens.txt")


def _open_export(path: Path, variant: str | None) -> Recogniser | None:
    from kdrecipe.measure.exports import find_exports
    from kdrecipe.plugin.loader import load_plugins

    exports = {export.variant: export for export in find_exports(path, load_plugins().registry)}
    for name in (variant,) if variant is not None and path.is_dir() else reversed(exports):
        if name in exports:
            return exports[name].load()
    return None


class BundleRunner:
    """A bundle as a :class:`Recogniser`: torch, Lhotse's features, any decoder.

    Args:
        path: the bundle's directory.
        decoder: name of the search; its options are the defaults. None: the greedy one of the
            model's first head.
        trust_plugins: run the plugin files that the bundle brings.

    Raises:
        KdrecipeError: the model lacks the decoder's head, or the bundle brings code that is not trusted.
    """

    def __init__(self, path: Path, decoder: str | None = None, *, trust_plugins: bool = False) -> None:
        from kdrecipe.model.bundle import Bundle
        from kdrecipe.model.decoders import build_decoder

        self.bundle = Bundle.load(path, trust_plugins=trust_plugins)
        self.pieces: list[str] = self.bundle.tokens.pieces
        first = next(iter(self.bundle.meta["model"]["heads"]))
        self._decoder = build_decoder(self.bundle, Named(decoder or f"{first}_greedy"))

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate."""
        from kdrecipe.measure.search import recognise

        model, features = self.bundle.model, self.bundle.meta["features"]
        return recognise(model, self._decoder, features, samples_S, sample_rate, longest_s)


def show(name: str, hypothesis: Hypothesis, pieces: Sequence[str]) -> str:
    """The text, then a line per word: its start in seconds, the word, and its tokens with theirs."""
    lines = [name, f"  {hypothesis.text or '(nothing recognised)'}"]
    for word in _words(hypothesis, pieces):
        text = "".join(piece for piece, _ in word).replace(WORD_START, "")
        tokens = "  ".join(f"{piece}@{start_s:.2f}" for piece, start_s in word)
        lines.append(f"  {word[0][1]:8.2f} s  {text:<16s} {tokens}")
    return "\n".join(lines)


def _words(hypothesis: Hypothesis, pieces: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Tokens and their starts, by word."""
    words: list[list[tuple[str, float]]] = []
    for token, start_s in zip(hypothesis.tokens, hypothesis.times_s, strict=False):
        if not words or pieces[token].startswith(WORD_START):
            words.append([])
        words[-1].append((pieces[token], start_s))
    return words
