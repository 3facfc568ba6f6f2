"""Encoders without a head by transformers: wav2vec 2.0, HuBERT, WavLM and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from kdrecipe import hookimpl
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Batch, Hypothesis, Located, Options, Targets, TargetSpec

from .speech_encoder import SpeechEncoder


class HfEncoderOptions(Options):
    """Options of ``name: hf_encoder``.

    Args:
        path: a directory as ``save_pretrained`` writes it, or a name on Hugging Face's hub
            (``microsoft/wavlm-base-plus``).
    """

    path: Annotated[str, Located]


class HfEncoder:
    """Hidden states of an encoder; it recognises nothing.

    Taps: ``encoder.N``, the output of block N, and ``encoder.out``, what the encoder as a whole gives.

    Args:
        config: its options.

    Raises:
        RecipeError: the model is not there, incomplete or of another kind.
        MissingExtra: transformers is not installed.
    """

    Config: ClassVar[type[Options]] = HfEncoderOptions
    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: HfEncoderOptions) -> None:
        self._encoder = SpeechEncoder(config.path, "teacher 'hf_encoder'", ctc=False)
        self.files: Sequence[Path] = self._encoder.found.files

    @property
    def num_params(self) -> int | None:
        """Parameters, once loaded."""
        return self._encoder.num_params

    def provides(self) -> list[TargetSpec]:
        """Hidden states."""
        return self._encoder.hidden_specs()

    def load(self, device: torch.device) -> None:
        """Read the weights."""
        self._encoder.load(device)

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Hidden states; see :class:`kdrecipe.interfaces.Teacher`."""
        _, hidden, _ = self._encoder.run(batch, [need.tap for need in needs])
        return Targets({need.key: hidden[need.tap] for need in needs})

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """None.

        Raises:
            DataError: always.
        """
        raise DataError(
            "a bare encoder recognises nothing",
            where=str(self._encoder.found.dir),
            remedy="use it for hidden states only, or a model with a CTC head: the teacher hf_ctc",
        )


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("hf_encoder", HfEncoder)
