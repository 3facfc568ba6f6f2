"""Recognise audio files with a bundle or an export, and say when each word starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdrecipe.data.audio import SAMPLE_RATE, read_audio, resample
from kdrecipe.errors import DataError, KdrecipeError, Problem
from kdrecipe.interfaces import Hypothesis, Options, Runner

WORD_START = "\u2581"  # SentencePiece's mark on a piece that begins a word


def transcribe(
    path: Path | str,
    audio_files: Sequence[Path | str],
    *,
    decoder: str = "ctc_greedy",
    variant: str | None = None,
) -> list[Hypothesis]:
    """Recognise files and print, per file, the text and the start of each word and token.

    Args:
        path: a bundle's directory, an export's directory, or its ``.onnx`` or ``.pt`` file.
        audio_files: of any sampling rate, read by libsndfile.
        decoder: the search, for bundles (exports bring their runtime's own).
        variant: ``fp32`` or ``int8`` of an export's directory; None: int8 if it is there.

    Returns:
        What was recognised, file by file.

    Raises:
        KdrecipeError: ``path`` is nothing to recognise with.
        DataError: audio can't be read; the files before it have been printed.
    """
    # All files are looked at first: better than stopping at the tenth of them.
    missing = [Problem("there is no such file", str(f)) for f in audio_files if not Path(f).is_file()]
    if missing:
        raise DataError(missing)
    runner, pieces = open_runner(Path(path), decoder=decoder, variant=variant)
    hypotheses = []
    for number, file in enumerate(audio_files):
        hypothesis = runner.transcribe(*read_audio(file))
        if number:
            print()
        print(show(str(file), hypothesis, pieces))
        hypotheses.append(hypothesis)
    return hypotheses


def open_runner(
    path: Path, *, decoder: str = "ctc_greedy", variant: str | None = None
) -> tuple[Runner, list[str]]:
    """What recognises, and its tokens by id; arguments as of :func:`transcribe`."""
    from kdrecipe_plugins.exporters.ctc import read_pieces

    if (path / "bundle.json").exists():
        runner = BundleRunner(path, decoder)
        return runner, runner.pieces
    model = _model_file(path, variant)
    pieces = read_pieces(model.parent / "tokens.txt")
    if model.suffix == ".pt":
        from kdrecipe_plugins.exporters.torchscript import TorchScriptRunner

        return TorchScriptRunner(model), pieces
    from kdrecipe_plugins.exporters.onnx_ctc import OnnxRunner

    return OnnxRunner(model), pieces


def _model_file(path: Path, variant: str | None) -> Path:
    """The exported model that ``path`` means."""
    if path.is_file() and path.suffix in (".onnx", ".pt"):
        return path
    names = [f"model{infix}.{suffix}" for suffix in ("onnx", "pt") for infix in (".int8", "")]
    if variant is not None:
        names = [name for name in names if (".int8." in name) == (variant == "int8")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise KdrecipeError(
        f"there is neither a bundle (bundle.json) nor an export ({' or '.join(names)})",
        where=str(path),
        remedy="give exp/systems/<system>/seed<k>, exp/exports/<system>/seed<k>/onnx_ctc, or a model file",
    )


class BundleRunner:
    """A bundle as a :class:`~kdrecipe.interfaces.Runner`: torch, Lhotse's features, any decoder.

    Args:
        path: the bundle's directory.
        decoder: name of the search; its options are the defaults.
    """

    def __init__(self, path: Path, decoder: str = "ctc_greedy") -> None:
        from kdrecipe.bundle import Bundle

        self.bundle = Bundle.load(path)
        self.pieces: list[str] = self.bundle.tokens.pieces
        cls = self.bundle.registry.get("decoders", decoder)
        config: Options = cls.Config()
        self._decoder = cls(config, self.bundle.tokens, self.bundle.meta["frame_shift_s"])

    def log_probs(self, features_BTF: np.ndarray, lens_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, V) log-posteriors of the ``ctc`` head and (B,) lengths."""
        import torch

        with torch.no_grad():
            out = self.bundle.model(torch.from_numpy(features_BTF).float(), torch.from_numpy(lens_B).long())
        return out.logits["ctc"].log_softmax(-1).numpy(), out.lens_B.numpy()

    def transcribe(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        """Recognise one utterance of any sampling rate."""
        import torch

        from kdrecipe.data.features import extract

        features_TF = extract(resample(samples_S, sample_rate), SAMPLE_RATE, self.bundle.meta["features"])
        with torch.no_grad():
            out = self.bundle.model(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
        result: Hypothesis = self._decoder.decode(self.bundle.model, out)[0]
        return result


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
