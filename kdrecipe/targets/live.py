"""What a teacher says about utterances, computed on the fly.

:class:`LiveTargets` and :class:`kdrecipe.targets.cache.TargetCache` give a loss the same object:
posteriors cut to the top k, hidden states, lattices, all rounded to the type in which they are
stored. Given the same batches they agree bit for bit; a batch put together differently can move a
value by one step of that type, since matrix products depend on the shapes.

Targets of attention decoders and transducers depend on a text. For a labelled utterance that is its
transcript, for any other the teacher's own hypothesis, by greedy search of its first head.

B utterances, U tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdrecipe.errors import DataError, PluginError
from kdrecipe.interfaces import (
    BLANK_ID,
    FORCED_KINDS,
    TAP_KINDS,
    Batch,
    Hypothesis,
    ModelOutput,
    Options,
    Targets,
    TargetSpec,
    Teacher,
    TokenTable,
    taps_of,
)
from kdrecipe.model.asr import model_info
from kdrecipe.targets.kinds import kind_of

if TYPE_CHECKING:
    from kdrecipe.model.asr import AsrModel
    from kdrecipe.model.bundle import Bundle


class ModelTeacher:
    """A model of kdrecipe's own as a :class:`~kdrecipe.interfaces.Teacher`.

    Args:
        model: it is frozen here.
        tokens: that it counts in, for :meth:`hypotheses`; None: it gives none.
        files: of its bundle.
    """

    Config: ClassVar[type[Options]] = Options
    input: ClassVar[Literal["features", "audio"]] = "features"

    def __init__(self, model: AsrModel, tokens: TokenTable | None = None, files: Sequence[Path] = ()) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokens = tokens
        self.files = files
        self.num_params: int | None = sum(p.numel() for p in model.parameters())

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> ModelTeacher:
        """The model of a bundle."""
        return cls(bundle.model, bundle.tokens, bundle.files)

    def provides(self) -> list[TargetSpec]:
        """Every kind of its heads, and the hidden states at its taps."""
        return model_info(self._model, self._tokens.vocab_id if self._tokens else "").provides()

    def load(self, device: torch.device) -> None:
        """Move the model."""
        self._model.to(device)

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Exact targets for ``batch``, whose features must not be masked: the teacher hears all of them."""
        model = self._model.eval()  # other users of the module may have set it back
        forced = any(spec.kind in FORCED_KINDS for spec in needs)
        taps = [spec.tap for spec in needs if spec.kind in TAP_KINDS]
        with model.tapped(taps) as of_encoder:
            out = model.encode(batch.features_BTF.float(), batch.lens_B)
        if forced:
            batch = self._with_hypotheses(batch, out)
        with model.tapped(taps) as of_heads:
            out = model.with_heads(out, batch if forced else None)
        out = replace(out, taps={**of_encoder, **of_heads})
        items = {
            spec.key: kind_of(spec).of_model(self._with_frames_of(spec, out, batch), batch, spec)
            for spec in needs
        }
        return Targets(items, batch.tokens_BU, batch.token_lens_B) if forced else Targets(items)

    def _with_frames_of(self, spec: TargetSpec, out: ModelOutput, batch: Batch) -> ModelOutput:
        """The output with the lengths of the tap, where that has other frames than the encoder's output."""
        if spec.kind != "hidden":
            return out
        tap = taps_of(self._model.encoder, dict(self._model.heads.items()))[spec.tap]  # type: ignore[arg-type]
        if tap.subsampling is None:
            return out
        lens_B = torch.div(batch.lens_B + tap.subsampling - 1, tap.subsampling, rounding_mode="floor")
        return replace(out, lens_B=lens_B.clamp(max=out.taps[spec.tap].shape[1]))

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """By greedy search of its first head."""
        if self._tokens is None:
            raise DataError("the model has no tokens to write its hypotheses in")
        model = self._model.eval()
        found = model.greedy(model.encode(batch.features_BTF.float(), batch.lens_B))
        return [Hypothesis(self._tokens.decode(tokens), tokens) for tokens in found]

    def _with_hypotheses(self, batch: Batch, out: ModelOutput) -> Batch:
        """The batch with the teacher's own words where there are no labels."""
        rows_B = ~batch.labelled_B
        if not bool(rows_B.any()):
            return batch
        said = self._model.greedy(out.select(rows_B))
        texts = [
            row[:length] for row, length in zip(batch.tokens_BU.tolist(), batch.token_lens_B, strict=True)
        ]
        for row, tokens in zip(rows_B.nonzero().flatten().tolist(), said, strict=True):
            texts[row] = tokens
        tokens_BU, token_lens_B = padded_tokens(texts)
        device = batch.tokens_BU.device
        return replace(batch, tokens_BU=tokens_BU.to(device), token_lens_B=token_lens_B.to(device))


class LiveTargets:
    """A teacher at work: in float32, no gradient.

    Args:
        teacher: loaded onto the device of the batches.
        specs: the targets to compute.

    Raises:
        DataError: a kind of target that can't be computed.
    """

    def __init__(self, teacher: Teacher, specs: Sequence[TargetSpec]) -> None:
        self._kinds = {spec.key: kind_of(spec) for spec in specs}
        self.teacher = teacher
        self.specs = tuple(specs)

    @property
    def hears_audio(self) -> bool:
        """Whether batches must carry audio."""
        return self.teacher.input == "audio"

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """All targets for ``batch``.

        Raises:
            PluginError: the teacher left one out.
        """
        with torch.autocast(batch.features_BTF.device.type, enabled=False):
            found = self.teacher.targets(batch, self.specs)
        items: dict[str, Any] = {}
        for spec in self.specs:
            if spec.key not in found.items:
                raise PluginError(f"the teacher {type(self.teacher).__name__} gave no {spec.key}, as asked")
            items[spec.key] = self._kinds[spec.key].rounded(found.items[spec.key], spec)
        return replace(found, items=items)


def padded_tokens(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as (B, U) int64, padded with BLANK_ID, and their lengths."""
    lens_B = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    tokens_BU = torch.full((len(texts), max(map(len, texts), default=0)), BLANK_ID, dtype=torch.int64)
    for row, text in zip(tokens_BU, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.int64)
    return tokens_BU, lens_B
