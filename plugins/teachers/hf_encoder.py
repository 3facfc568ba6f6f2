"""Encoders without a head by transformers: wav2vec 2.0, HuBERT, WavLM and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdrecipe import hookimpl
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Batch, Hypothesis, Targets, TargetSpec

from .speech_encoder import SpeechEncoder, SpeechEncoderOptions


class HfEncoder(SpeechEncoder):
    """Hidden states of an encoder; it recognises nothing.

    Taps: ``encoder.N``, the output of block N, and ``encoder.out``, what the encoder as a whole gives.

    Args:
        config: its options.

    Raises:
        RecipeError: the model is not there, incomplete or of another kind.
        MissingExtra: transformers is not installed.
    """

    def __init__(self, config: SpeechEncoderOptions) -> None:
        super().__init__(config, "teacher 'hf_encoder'", ctc=False)

    def provides(self) -> list[TargetSpec]:
        """Hidden states."""
        return self.hidden_specs()

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Hidden states; see :class:`kdrecipe.interfaces.Teacher`."""
        _, hidden, _ = self.run(batch, [need.tap for need in needs])
        return Targets({need.key: hidden[need.tap] for need in needs})

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """None.

        Raises:
            DataError: always.
        """
        raise DataError(
            "a bare encoder recognises nothing",
            where=str(self.found.dir),
            remedy="use it for hidden states only, or a model with a CTC head: the teacher hf_ctc",
        )


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("hf_encoder", HfEncoder)
