"""What teachers share that speak frame by frame: one utterance at a time, so that no other one matters.

A model of elsewhere may look at padding, and dynamic int8 has one scale per batch; alone, an utterance can
depend on neither. S samples, T frames, F feature bins, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdrecipe.corpus.audio import padded, recognise_long
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import keep_top
from kdrecipe.interfaces import (
    SAMPLE_RATE,
    Batch,
    Hidden,
    Hypothesis,
    Posteriors,
    TargetItem,
    Targets,
    TargetSpec,
)

from .own_tokens import CtcTokens

LOGITS = "frame_logits:ctc"
"""The key of posteriors."""

TRIAL_S = 4.0
TRIAL_TOLERANCE_S = 0.4  # front ends without padding lose some frames at the ends

Say = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
"""An utterance on the CPU, float32 samples (S,) or features (T, F), and keys of targets -> (T', D) each."""


class ByFrames:
    """The targets and hypotheses of a model that says something of every frame.

    Args:
        name: of the teacher, for messages.
        hears: what an utterance is, samples or features.
        num_mel_bins: F; None of audio.
        tokens: those of the posteriors; None without any.
        frame_shift_s: of the posteriors.
        hidden: by tap, D and the frame shift in seconds.
    """

    def __init__(
        self,
        name: str,
        hears: Literal["features", "audio"],
        num_mel_bins: int | None,
        tokens: CtcTokens | None,
        frame_shift_s: float | None,
        hidden: Mapping[str, tuple[int, float]],
    ) -> None:
        self.name, self.hears, self.num_mel_bins = name, hears, num_mel_bins
        self.tokens, self.frame_shift_s = tokens, frame_shift_s
        self.specs = [TargetSpec("hidden", tap, dim, shift_s) for tap, (dim, shift_s) in hidden.items()]
        if tokens is not None:
            self.specs.insert(
                0, TargetSpec("frame_logits", "ctc", len(tokens), frame_shift_s, tokens.vocab_id)
            )

    @torch.no_grad()
    def targets(self, batch: Batch, needs: Sequence[TargetSpec], say: Say) -> Targets:
        """What ``say`` says of each utterance, padded with zeros."""
        keys = [need.key for need in needs]
        said = [say(utterance, keys) for utterance in self._utterances(batch)]
        device = batch.lens_B.device
        items: dict[str, TargetItem] = {}
        for need in needs:
            rows = [self._finished(need.key, row[need.key]).to(device) for row in said]
            lens_B = torch.tensor([len(row) for row in rows], device=device)
            values_BTD = pad_sequence(rows, batch_first=True)
            if need.kind == "hidden":
                items[need.key] = Hidden(values_BTD, lens_B)
            else:
                items[need.key] = keep_top(Posteriors(values_BTD, lens_B), need.top_k)
        return Targets(items)

    @torch.no_grad()
    def hypotheses(self, batch: Batch, say: Say) -> list[Hypothesis]:
        """Greedy search on the posteriors, of long audio pause by pause.

        Raises:
            DataError: there are no posteriors.
        """
        if self.tokens is None:
            raise DataError(
                f"{self.name} recognises nothing: it gives hidden states only",
                remedy="its hypotheses can't be had; name the tokens of its output, if it has one",
            )
        utterances = self._utterances(batch, fill=False)
        if self.hears == "features":
            return [self._recognise(utterance, say) for utterance in utterances]

        def recognise(samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
            return self._recognise(torch.from_numpy(np.ascontiguousarray(samples_S)), say)

        return [recognise_long(recognise, [samples_S.numpy()], SAMPLE_RATE) for samples_S in utterances]

    def check(self, say: Say, where: str) -> None:
        """Let the model speak for the first time, and refuse it if it is not as declared.

        Raises:
            RecipeError: it fails on four seconds of audio, or a dimension or a frame shift is another.
        """
        if self.hears == "audio":
            shape: tuple[int, ...] = (round(TRIAL_S * SAMPLE_RATE),)
        else:
            shape = (round(TRIAL_S * 100), self.num_mel_bins or 0)
        keys = [spec.key for spec in self.specs]
        try:
            with torch.no_grad():
                said = say(0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(0)), keys)
        except RecipeError:
            raise
        except Exception as error:  # each runtime has its own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RecipeError(
                f"it fails on {TRIAL_S:g} s of {self.hears}: {lines[-1].strip()}",
                where=where,
                remedy="look at what the file takes: input, input_name, lens_name",
            ) from error
        for spec in self.specs:
            self._check_said(spec, said[spec.key], where)

    def _check_said(self, spec: TargetSpec, values: Tensor, where: str) -> None:
        what = "its posteriors" if spec.key == LOGITS else f"its hidden states {spec.tap!r}"
        if values.dim() != 2 or values.shape[1] != spec.dim:
            has = " x ".join(map(str, values.shape))
            says = self.tokens.path if self.tokens and spec.key == LOGITS else "dim"
            raise RecipeError(f"{what} are {has}, not frames x {spec.dim}, as {says} has it", where=where)
        assert spec.frame_shift_s is not None
        if abs(len(values) * spec.frame_shift_s - TRIAL_S) > TRIAL_TOLERANCE_S:
            raise RecipeError(
                f"{what} have {len(values)} frames of {TRIAL_S:g} s, that is one every "
                f"{TRIAL_S / max(1, len(values)):.3g} s, not every {spec.frame_shift_s:g} s",
                where=where,
                remedy="set frame_shift_s to what it is",
            )

    def _recognise(self, utterance: Tensor, say: Say) -> Hypothesis:
        assert self.tokens is not None
        assert self.frame_shift_s is not None
        log_probs_TV = self._finished(LOGITS, say(utterance, [LOGITS])[LOGITS])
        return self.tokens.hypothesis(log_probs_TV.cpu(), self.frame_shift_s)

    def _finished(self, key: str, values_TD: Tensor) -> Tensor:
        if key == LOGITS and self.tokens is not None:
            return self.tokens.log_probs(values_TD)
        return values_TD.float()

    def _utterances(self, batch: Batch, *, fill: bool = True) -> Iterator[Tensor]:
        """The valid part of each row on the CPU; ``fill``: no audio is below one window of features."""
        if self.hears == "audio":
            yield from audio_of(batch, fill=fill)
            return
        if batch.features_BTF.shape[2] != self.num_mel_bins:
            raise RecipeError(
                f"{self.name} takes {self.num_mel_bins} mel bins, the recipe's features have "
                f"{batch.features_BTF.shape[2]}",
                where="features.num_mel_bins",
                remedy="change the recipe's features, or give it audio if it can take that",
            )
        for row_TF, length in zip(batch.features_BTF.cpu(), batch.lens_B.tolist(), strict=True):
            yield row_TF[:length]


def audio_of(batch: Batch, *, fill: bool) -> Iterator[Tensor]:
    """Samples (S,) of each row on the CPU; ``fill``: with zeros up to one window of features."""
    assert batch.samples_BS is not None, "the batch must carry audio"
    assert batch.sample_lens_B is not None
    for row_S, length in zip(batch.samples_BS.cpu(), batch.sample_lens_B.tolist(), strict=True):
        samples_CS = row_S[None, :length].numpy()
        yield torch.from_numpy(padded(samples_CS, SAMPLE_RATE) if fill else samples_CS)[0]
