"""What a teacher says about utterances, computed on the fly.

:class:`LiveTargets` and :class:`kdrecipe.targets.cache.TargetCache` give a loss the same object:
posteriors cut to the top k, hidden states, lattices, all rounded to the type in which they are
stored. Given the same batches they agree bit for bit; a batch put together differently can move a
value by one step of that type, since matrix products depend on the shapes.

Targets of attention decoders and transducers depend on a text. For a labelled utterance that is its
transcript, for any other the teacher's own hypothesis, by greedy search of its first head.

B utterances, T frames, U tokens, P = U + 1 positions between them, K kept classes, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB, frame_mask, keep_top
from kdrecipe.interfaces import (
    BLANK_ID,
    FORCED_KINDS,
    Batch,
    Hidden,
    LatticePosteriors,
    ModelOutput,
    Posteriors,
    Targets,
    TargetSpec,
)
from kdrecipe.lattice import full_lattice_posteriors

KINDS = ("frame_logits", "hidden", "token_logits", "rnnt_lattice")  # those that can be computed and cached


class LiveTargets:
    """A teacher at work: evaluation mode, float32, no gradient.

    Args:
        model: the teacher, a :class:`kdrecipe.model.asr.AsrModel`, on the device of the batches; it is
            frozen here.
        specs: the targets to compute.

    Raises:
        DataError: a kind of target that can't be computed.
    """

    def __init__(self, model: nn.Module, specs: Sequence[TargetSpec]) -> None:
        for spec in specs:
            if spec.kind not in KINDS:
                raise DataError(
                    f"targets of kind {spec.kind!r} can't be computed", remedy=f"use {' or '.join(KINDS)}"
                )
        self.model = model.eval().requires_grad_(False)
        self.specs = tuple(specs)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """All targets for ``batch``, whose features must not be masked: the teacher hears all of them."""
        model = self.model.eval()  # other users of the module may have set it back
        taps = [spec.tap for spec in self.specs if spec.kind == "hidden"]
        forced = any(spec.kind in FORCED_KINDS for spec in self.specs)
        with torch.autocast(batch.features_BTF.device.type, enabled=False):
            out = model.encode(batch.features_BTF.float(), batch.lens_B, taps=taps)  # type: ignore[operator]
            if forced:
                batch = self._with_hypotheses(batch, out)
            out = model.with_heads(out, batch if forced else None)  # type: ignore[operator]
        items = {spec.key: _target(out, batch, spec) for spec in self.specs}
        return Targets(items, batch.tokens_BU, batch.token_lens_B) if forced else Targets(items)

    def _with_hypotheses(self, batch: Batch, out: ModelOutput) -> Batch:
        """The batch with the teacher's own words where there are no labels."""
        rows_B = ~batch.labelled_B
        if not bool(rows_B.any()):
            return batch
        said = self.model.greedy(out.select(rows_B))  # type: ignore[operator]
        texts = [
            row[:length] for row, length in zip(batch.tokens_BU.tolist(), batch.token_lens_B, strict=True)
        ]
        for row, tokens in zip(rows_B.nonzero().flatten().tolist(), said, strict=True):
            texts[row] = tokens
        tokens_BU, token_lens_B = padded_tokens(texts)
        device = batch.tokens_BU.device
        return replace(batch, tokens_BU=tokens_BU.to(device), token_lens_B=token_lens_B.to(device))


def padded_tokens(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as (B, U) int64, padded with BLANK_ID, and their lengths."""
    lens_B = torch.tensor([len(text) for text in texts], dtype=torch.int64)
    tokens_BU = torch.full((len(texts), max(map(len, texts), default=0)), BLANK_ID, dtype=torch.int64)
    for row, text in zip(tokens_BU, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.int64)
    return tokens_BU, lens_B


def _target(out: ModelOutput, batch: Batch, spec: TargetSpec) -> Posteriors | Hidden | LatticePosteriors:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.kind == "rnnt_lattice":
        return _lattice(out, spec.tap, dtype)
    lens_B = batch.token_lens_B + 1 if spec.kind == "token_logits" else out.lens_B
    length = int(lens_B.max()) if len(lens_B) else 0
    padding_BT1 = ~frame_mask(lens_B, length)[..., None]

    def stored(values_BTX: Tensor) -> Tensor:
        """Rounded as on disk, padding 0."""
        return values_BTX[:, :length].to(dtype).float().masked_fill(padding_BT1, 0.0)

    if spec.kind == "hidden":
        return Hidden(stored(out.taps[spec.tap]), lens_B)
    all_BTV = out.logits[spec.tap].float().log_softmax(-1)
    top = keep_top(Posteriors(all_BTV, lens_B), spec.top_k)
    log_probs_BTK = stored(top.log_probs_BTK.clamp(min=MIN_LOG_PROB))
    if top.indices_BTK is None or top.log_tail_BT is None:
        return Posteriors(log_probs_BTK, lens_B)
    return Posteriors(
        log_probs_BTK,
        lens_B,
        top.indices_BTK[:, :length].masked_fill(padding_BT1, 0),
        stored(top.log_tail_BT[..., None].clamp(min=MIN_LOG_PROB))[..., 0],
    )


def _lattice(out: ModelOutput, head: str, dtype: torch.dtype) -> LatticePosteriors:
    """Rounded as on disk; 0 beyond the last frame and position, and for the last position's next token."""
    found = full_lattice_posteriors(out.lattices[head])
    frames_BT = frame_mask(found.lens_B, int(found.lens_B.max()) if len(found.lens_B) else 0)
    values = found.log_probs_BTP2[:, : frames_BT.shape[1]].clamp(min=MIN_LOG_PROB).to(dtype).float()
    positions_BP = frame_mask(found.token_lens_B + 1, values.shape[2])
    has_next_BP = frame_mask(found.token_lens_B, values.shape[2])
    means_BP2 = torch.stack([has_next_BP, positions_BP], dim=-1)
    valid = frames_BT[:, :, None, None] & means_BP2[:, None]
    return LatticePosteriors(values.masked_fill(~valid, 0.0), found.lens_B, found.token_lens_B)
