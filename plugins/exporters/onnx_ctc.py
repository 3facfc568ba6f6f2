"""ONNX for sherpa-onnx's slot of CTC models that subsample by 4.

::

    model.onnx  model.int8.onnx  tokens.txt

    sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model="model.int8.onnx", tokens="tokens.txt")

Inputs: ``x`` (N, T, F) float32 log-mel features, not normalised, and ``x_lens`` (N,) int64; outputs:
``log_probs`` (N, T', V) and ``log_probs_len`` (N,). N and T vary; sherpa-onnx reads V from the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.data.tokens import ids_by_name, read_pieces
from kdrecipe.interfaces import BundleLike, Hypothesis, Runner, Runtime, RuntimeSearch

from . import onnx_files, sherpa
from .shared import (
    CtcLogProbs,
    best_path,
    check_head,
    existing,
    valid_rows,
)


class OnnxCtc:
    """Exporter ``onnx_ctc``: encoder and ``ctc`` head, nothing of other heads."""

    head = "ctc"
    runtime = Runtime(
        "sherpa-onnx",
        "kdrecipe_plugins.exporters.runtimes:sherpa_ctc",
        {"ctc_greedy": RuntimeSearch("greedy_search")},
    )
    suffix = ".onnx"
    variants = onnx_files.VARIANTS
    files = onnx_files.file_names("model")
    Config = onnx_files.OnnxOptions
    speller = staticmethod(sherpa.ctc_speller)
    ships = staticmethod(onnx_files.ships)

    def __init__(self, config: onnx_files.OnnxOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the variants; that of a quantised bundle has exactly its integers and scales.

        Raises:
            KdrecipeError: no CTC head, or another frame rate than the slot's.
        """
        check_head(bundle, self.head, "onnx_ctc")
        sherpa.check_frame_shift(bundle, "onnx_ctc")
        num_bins = int(bundle.meta["features"]["num_mel_bins"])

        def parts(model: nn.Module) -> list[onnx_files.Part]:
            part = onnx_files.Part(
                "model",
                CtcLogProbs(model),
                onnx_files.example_batch(num_bins),
                {"x": ("N", "T", ""), "x_lens": ("N",)},
                {"log_probs": ("N", "T_out", ""), "log_probs_len": ("N",)},
                # how sherpa-onnx finds the kind of model if none is named
                onnx_files.metadata(bundle, "zipformer2_ctc", subsampling_factor=sherpa.SUBSAMPLING),
            )
            return [part]

        written = onnx_files.write(parts, bundle, self.config, directory)
        sherpa.write_tokens(directory)
        return written

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant.

        Raises:
            KdrecipeError: there is no such file.
        """
        return OnnxRunner(Path(directory) / self.files[variant]["model"], num_threads=num_threads)

    @staticmethod
    def load_file(path: Path) -> Runner:
        """A CTC model of any name, with ``tokens.txt`` beside it.

        Raises:
            KdrecipeError: there is no such file.
        """
        return OnnxRunner(path)


class OnnxRunner:
    """``model.onnx`` with the ``tokens.txt`` beside it.

    Log-posteriors come from onnxruntime, texts from sherpa-onnx, its features included: what a
    device runs.
    """

    def __init__(self, model: Path, *, num_threads: int = 1) -> None:
        self.model = existing(model)
        self.tokens = existing(model.parent / onnx_files.TOKENS)
        self.num_threads = num_threads

    def log_probs(self, features_BTF: np.ndarray, lens_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, V) log-posteriors and (B,) lengths."""
        inputs = {"x": features_BTF.astype(np.float32), "x_lens": lens_B.astype(np.int64)}
        log_probs_BTV, out_lens_B = onnx_files.run(self._session, inputs)
        return log_probs_BTV, out_lens_B

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (T, V) log-posteriors; CTC needs no path."""
        return valid_rows(*self.log_probs(features_BTF, lens_B))

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """Tokens of the best path."""
        return best_path(valid_rows(*self.log_probs(features_TF[None], np.array([len(features_TF)])))[0])[0]

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length; sherpa-onnx resamples if it must."""
        return sherpa.recognise(self._recogniser, self._ids, samples_S, sample_rate, longest_s)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return onnx_files.session(self.model, self.num_threads)

    @cached_property
    def _recogniser(self) -> Any:
        import sherpa_onnx

        # sherpa-onnx ends the process when a file is damaged; onnxruntime says what is wrong
        num_bins = self._session.get_inputs()[0].shape[2]
        return sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
            model=str(self.model),
            tokens=str(self.tokens),
            num_threads=self.num_threads,
            feature_dim=num_bins,
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return ids_by_name(read_pieces(self.tokens))


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("onnx_ctc", OnnxCtc)
