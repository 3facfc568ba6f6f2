"""TorchScript: a traced ``model.pt`` for runtimes built on libtorch, features described within."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.corpus.audio import recognise_long, resample
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.data.features import extract
from kdrecipe.data.tokens import read_pieces
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, BundleLike, Hypothesis, Options, Runner, float_copy

from .onnx_files import VARIANTS, ships
from .shared import (
    CtcLogProbs,
    best_path,
    check_head,
    existing,
    join_pieces,
    valid_rows,
)

NOTES = "kdrecipe.json"  # within the file: features and frame shift


class TorchScript:
    """Exporter ``torchscript``; integers only of quantised bundles, and those for the CPU."""

    head = "ctc"
    runtime = None
    variants: ClassVar = {name: VARIANTS[name] for name in ("fp32", "int4", "int8")}
    files: ClassVar = {
        "fp32": {"model": "model.pt"},
        "int4": {"model": "model.int4.pt"},
        "int8": {"model": "model.int8.pt"},
    }

    class Config(Options):
        """Nothing to choose."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write ``model.pt``, of a quantised bundle its own as well, and ``tokens.txt``.

        Raises:
            KdrecipeError: the model has no CTC head.
        """
        check_head(bundle, self.head, "torchscript")
        directory.mkdir(parents=True, exist_ok=True)
        models = {"fp32": float_copy(bundle.model), self.ships(bundle.number_formats): bundle.model}
        notes = {"features": bundle.meta["features"], "frame_shift_s": bundle.meta["frame_shift_s"]}
        for variant, model in models.items():
            traced = _trace(model, int(bundle.meta["features"]["num_mel_bins"]))
            traced.save(
                str(directory / self.files[variant]["model"]), _extra_files={NOTES: json.dumps(notes)}
            )
        shutil.copyfile(bundle.path / "tokens.txt", directory / "tokens.txt")
        return {variant: [self.files[variant]["model"], "tokens.txt"] for variant in models}

    @staticmethod
    def ships(number_formats: Collection[str]) -> str:
        """The variant that computes as a bundle does; scales per frame or static make no difference here."""
        return ships(number_formats).removesuffix("_qdq")

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant; ``num_threads`` is the process's to set, with ``torch.set_num_threads``.

        Raises:
            KdrecipeError: there is no such file, or it is damaged.
        """
        return TorchScriptRunner(Path(directory) / self.files[variant]["model"])


class TorchScriptRunner:
    """``model.pt`` with the ``tokens.txt`` beside it; features by Lhotse, greedy search."""

    def __init__(self, model: Path) -> None:
        notes = {NOTES: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about TorchScript's age
                self._model = torch.jit.load(str(existing(model)), map_location="cpu", _extra_files=notes)
        except RuntimeError as error:
            raise KdrecipeError(f"torch can't load the model: {error}", where=str(model)) from error
        self._notes: dict[str, Any] = json.loads(notes[NOTES])
        self._where = model.parent / "tokens.txt"
        self._pieces = read_pieces(self._where)

    @torch.no_grad()
    def log_probs(self, features_BTF: np.ndarray, lens_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, V) log-posteriors and (B,) lengths."""
        log_probs_BTV, out_lens_B = self._model(
            torch.from_numpy(features_BTF).float(), torch.from_numpy(lens_B).long()
        )
        return log_probs_BTV.numpy(), out_lens_B.numpy()

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (T, V) log-posteriors; CTC needs no path."""
        return valid_rows(*self.log_probs(features_BTF, lens_B))

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """Tokens of the best path."""
        return best_path(self._log_probs_of_one(features_TF))[0]

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate."""
        return recognise_long(self._recognise, [samples_S], sample_rate, longest_s)

    def _recognise(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        features_TF = extract(resample(samples_S, sample_rate), SAMPLE_RATE, self._notes["features"])
        log_probs_TV = self._log_probs_of_one(features_TF)
        tokens, frames = best_path(log_probs_TV)
        times_s = [frame * self._notes["frame_shift_s"] for frame in frames]
        text = join_pieces(self._pieces[i] for i in tokens)
        return Hypothesis(text, tokens, times_s, float(log_probs_TV.max(-1).sum()))

    def _log_probs_of_one(self, features_TF: np.ndarray) -> np.ndarray:
        found: np.ndarray = valid_rows(*self.log_probs(features_TF[None], np.array([len(features_TF)])))[0]
        if found.shape[1] != len(self._pieces):
            raise KdrecipeError(
                f"tokens.txt lists {len(self._pieces)} tokens, the model has {found.shape[1]}",
                where=str(self._where),
                remedy="copy the tokens.txt that the export stage wrote beside the model",
            )
        return found


def _trace(model: nn.Module, num_bins: int) -> torch.jit.ScriptModule:
    example = torch.zeros(2, 77, num_bins), torch.tensor([77, 50])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript's age; what matters the parity gate finds
        traced: torch.jit.ScriptModule = torch.jit.trace(
            CtcLogProbs(model).eval(), example, check_trace=False
        )
    return traced


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("torchscript", TorchScript)
