"""Posteriors over tokens, per frame of a CTC head or per token of a decoder.

B utterances, T frames or tokens, V vocabulary, K kept classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB, keep_top
from kdrecipe.interfaces import BLANK_ID, Batch, ModelOutput, Posteriors, TargetSpec
from kdrecipe.targets.kinds.storing import array, as_stored, padded

if TYPE_CHECKING:
    from kdrecipe.targets.kinds.weights import FrameWeights


class _Posteriors:
    def rounded(self, item: Posteriors, spec: TargetSpec) -> Posteriors:
        top = keep_top(item, spec.top_k)
        log_probs_BTK = as_stored(top.log_probs_BTK.clamp(min=MIN_LOG_PROB), top.lens_B, spec.dtype)
        if top.indices_BTK is None or top.log_tail_BT is None:
            return Posteriors(log_probs_BTK, top.lens_B)
        valid_BT1 = as_stored(torch.ones_like(top.log_probs_BTK[..., :1]), top.lens_B, "float32").bool()
        return Posteriors(
            log_probs_BTK,
            top.lens_B,
            top.indices_BTK[:, : valid_BT1.shape[1]].masked_fill(~valid_BT1, 0),
            as_stored(top.log_tail_BT.clamp(min=MIN_LOG_PROB), top.lens_B, spec.dtype),
        )

    def parts(self, item: Posteriors, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        length = int(item.lens_B[row])
        parts = {"log_probs": array(item.log_probs_BTK, row, length, spec.dtype)}
        if item.indices_BTK is not None and item.log_tail_BT is not None:
            small = item.indices_BTK.numel() == 0 or int(item.indices_BTK.max()) <= np.iinfo(np.int16).max
            parts["indices"] = array(item.indices_BTK, row, length, "int16" if small else "int32")
            parts["log_tail"] = array(item.log_tail_BT, row, length, spec.dtype)
        return parts

    def collated(self, rows: Sequence[Any]) -> Posteriors:
        parts = {name: padded([row[name] for row in rows]) for name in rows[0]}
        lens_B = torch.tensor([len(row["log_probs"]) for row in rows])
        return Posteriors(parts["log_probs"], lens_B, parts.get("indices"), parts.get("log_tail"))

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        """Blank is certain."""
        if part == "log_tail":
            return MIN_LOG_PROB
        classes = np.arange(len(before))
        if part == "indices":
            return classes  # blank and whatever comes next, each once
        return np.where(classes == BLANK_ID, 0.0, MIN_LOG_PROB).astype(before.dtype)


class FramePosteriors(_Posteriors):
    """``frame_logits``: of a head that has posteriors at every frame."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Posteriors:
        return Posteriors(out.logits[spec.tap].float().log_softmax(-1), out.lens_B)

    def weighted(self, item: Posteriors, weights: FrameWeights) -> Posteriors:
        """The mean of probabilities, not of logarithms: of a token and a blank, half each.

        Of top-k posteriors, the classes that are among the k in none of the frames stay in the tail.
        """
        if item.indices_BTK is None or item.log_tail_BT is None:
            return Posteriors(_log(weights.mean(item.log_probs_BTK.exp())), weights.lens_B)
        top_k, num_classes = item.log_probs_BTK.shape[-1], int(item.indices_BTK.max()) + 1
        probs_BTV = item.log_probs_BTK.new_zeros(*item.log_probs_BTK.shape[:2], num_classes)
        probs_BTV.scatter_add_(-1, item.indices_BTK, item.log_probs_BTK.exp())
        tail_BT = weights.mean(item.log_tail_BT.exp()[..., None])[..., 0]
        classes_BTV = torch.arange(num_classes, device=probs_BTV.device).expand(*tail_BT.shape, -1)
        whole = Posteriors(_log(weights.mean(probs_BTV)), weights.lens_B, classes_BTV, _log(tail_BT))
        return keep_top(whole, top_k)


class TokenPosteriors(_Posteriors):
    """``token_logits``: of a decoder, at every token of a text and at its end."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Posteriors:
        return Posteriors(out.logits[spec.tap].float().log_softmax(-1), batch.token_lens_B + 1)

    def weighted(self, item: Posteriors, weights: FrameWeights) -> Posteriors:
        raise DataError("token_logits go by tokens, not by frames: there is nothing to align")


def _log(probs: Tensor) -> Tensor:
    return probs.log().clamp(min=MIN_LOG_PROB)
