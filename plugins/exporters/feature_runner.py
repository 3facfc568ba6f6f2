"""CTC exports whose runtime hears features: Lhotse's, one utterance at a time, greedy search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.corpus.audio import recognise_long, resample
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.data.features import extract
from kdrecipe.data.tokens import read_pieces
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, BundleLike, Hypothesis

from .shared import best_path, join_pieces

NOTES, TOKENS = "features.json", "tokens.txt"

Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Features (1, T, F) float32 and length (1,) int64 to log-posteriors (1, T', V) and their length (1,)."""


def write_notes(bundle: BundleLike, directory: Path) -> None:
    """Write what :class:`FeatureRunner` needs to know beside the model."""
    keys = ("features", "frame_shift_s")
    write_json(directory / NOTES, {key: bundle.meta[key] for key in keys})


class FeatureRunner:
    """A :class:`~kdrecipe.interfaces.Runner` of ``run``.

    Args:
        run: the model.
        directory: where ``tokens.txt`` and ``features.json`` are.

    Raises:
        KdrecipeError: one of these is missing or damaged.
    """

    def __init__(self, run: Run, directory: Path) -> None:
        self._run = run
        notes = read_json(directory / NOTES)
        self._features, self._frame_shift_s = notes["features"], float(notes["frame_shift_s"])
        self._where = directory / TOKENS
        self.pieces = read_pieces(self._where)

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (T, V) log-posteriors, with the padding that it comes with; CTC needs no path."""
        return [
            self._log_probs(row_TF, int(length)) for row_TF, length in zip(features_BTF, lens_B, strict=True)
        ]

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """Tokens of the best path."""
        return best_path(self._log_probs(features_TF, len(features_TF)))[0]

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate."""
        return recognise_long(self._recognise, [samples_S], sample_rate, longest_s)

    def _recognise(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        features_TF = extract(resample(samples_S, sample_rate), SAMPLE_RATE, self._features)
        log_probs_TV = self._log_probs(features_TF, len(features_TF))
        tokens, frames = best_path(log_probs_TV)
        text = join_pieces(self.pieces[i] for i in tokens)
        times_s = [frame * self._frame_shift_s for frame in frames]
        return Hypothesis(text, tokens, times_s, float(log_probs_TV.max(-1).sum()))

    def _log_probs(self, features_TF: np.ndarray, length: int) -> np.ndarray:
        """(T', V) of the valid frames."""
        features_1TF = np.ascontiguousarray(features_TF[None], dtype=np.float32)
        log_probs_1TV, out_lens_1 = self._run(features_1TF, np.array([length], dtype=np.int64))
        found_TV: np.ndarray = log_probs_1TV[0, : int(out_lens_1[0])]
        if found_TV.shape[1] != len(self.pieces):
            raise KdrecipeError(
                f"tokens.txt lists {len(self.pieces)} tokens, the model has {found_TV.shape[1]}",
                where=str(self._where),
                remedy="copy the tokens.txt that the export stage wrote beside the model",
            )
        return found_TV
