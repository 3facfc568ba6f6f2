"""The best texts of a CTC head. B utterances, N texts, U tokens, T frames, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB, ctc_greedy, ctc_nll_of_texts, frame_mask
from kdrecipe.interfaces import BLANK_ID, Batch, ModelOutput, NBest, TargetSpec
from kdrecipe.lattice.ctc import prefix_beam_search
from kdrecipe.targets.kinds.storing import padded

if TYPE_CHECKING:
    from torch import Tensor

    from kdrecipe.targets.kinds.weights import FrameWeights

BEAM_PER_TEXT = 2  # prefixes kept per text that is asked for, and at least MIN_BEAM
MIN_BEAM = 8


class Hypotheses:
    """``hypotheses``: one text by the best path, several by prefix beam search, each with its probability."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> NBest:
        return n_best(out.logits[spec.tap], out.lens_B, spec.top_k or 1)

    def rounded(self, item: NBest, spec: TargetSpec) -> NBest:
        """Padding is as much as it needs to be."""
        num_texts = spec.top_k or 1
        lens_BN = item.token_lens_BN[:, :num_texts]
        length = int(lens_BN.max()) if lens_BN.numel() else 0
        padding_BNU = torch.arange(length, device=lens_BN.device) >= lens_BN[..., None]
        tokens_BNU = item.tokens_BNU[:, :num_texts, :length].masked_fill(padding_BNU, BLANK_ID)
        log_probs_BN = item.log_probs_BN[:, :num_texts].to(getattr(torch, spec.dtype)).float()
        return NBest(tokens_BNU, lens_BN, log_probs_BN)

    def parts(self, item: NBest, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        lens_N = item.token_lens_BN[row].cpu().numpy().astype(np.int32)
        tokens_NU = item.tokens_BNU[row, :, : lens_N.max(initial=0)].cpu().numpy().astype(np.int32)
        log_probs_N = item.log_probs_BN[row].cpu().numpy().astype(spec.dtype)
        return {"tokens": tokens_NU, "token_lens": lens_N, "log_probs": log_probs_N}

    def collated(self, rows: Sequence[Any]) -> NBest:
        parts = ("tokens", "token_lens", "log_probs")
        return NBest(*(padded([row[part] for row in rows]) for part in parts))

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        raise DataError("hypotheses are of one utterance: utterances that are joined have none")

    def weighted(self, item: NBest, weights: FrameWeights) -> NBest:
        raise DataError("hypotheses do not go by frames: there is nothing to align")


def n_best(logits_BTV: Tensor, lens_B: Tensor, num_texts: int) -> NBest:
    """The best texts of a CTC head, without gradient.

    Probabilities are exact; which texts are found depends on the search.

    Args:
        logits_BTV: not normalised; padding may hold anything.
        lens_B: valid frames.
        num_texts: N; with one, the text of the best path.
    """
    logits_BTV = logits_BTV.detach().float()
    tokens_BNU, token_lens_BN, found_BN = (
        x.to(lens_B.device) for x in _padded(_texts(logits_BTV, lens_B, num_texts), num_texts)
    )
    log_probs_BN = -ctc_nll_of_texts(logits_BTV, lens_B, tokens_BNU, token_lens_BN)
    log_probs_BN = log_probs_BN.where(found_BN, MIN_LOG_PROB)
    # the search prunes alignments, so its order need not be that of the sums over all of them: the best are
    # chosen now, of all that it kept
    order_BN = log_probs_BN.argsort(dim=1, descending=True, stable=True)[:, :num_texts]
    tokens_BNU = tokens_BNU.gather(1, order_BN[..., None].expand(-1, -1, tokens_BNU.shape[-1]))
    return NBest(tokens_BNU, token_lens_BN.gather(1, order_BN), log_probs_BN.gather(1, order_BN))


def _texts(logits_BTV: Tensor, lens_B: Tensor, num_texts: int) -> list[list[Sequence[int]]]:
    """Candidates for the best texts of each utterance, without padding."""
    if num_texts == 1:
        return [[text] for text in ctc_greedy(logits_BTV, lens_B)[0]]
    beam = max(MIN_BEAM, BEAM_PER_TEXT * num_texts)
    log_probs_BTV = logits_BTV.log_softmax(-1).cpu().numpy().astype(np.float64)
    return [
        [text for text, _ in prefix_beam_search(log_probs_TV[:length], beam, beam)]
        for log_probs_TV, length in zip(log_probs_BTV, lens_B.tolist(), strict=True)
    ]


def _padded(texts: Sequence[Sequence[Sequence[int]]], at_least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, U), their number (B, N), and which texts there are (B, N)."""
    num_texts = max([at_least, *map(len, texts)])
    size = max((len(text) for found in texts for text in found), default=0)
    tokens_BNU = torch.full((len(texts), num_texts, size), BLANK_ID)
    token_lens_BN = torch.zeros(len(texts), num_texts, dtype=torch.int64)
    for row, found in enumerate(texts):
        for number, text in enumerate(found):
            tokens_BNU[row, number, : len(text)] = torch.tensor(list(text), dtype=torch.int64)
            token_lens_BN[row, number] = len(text)
    found_B = torch.tensor([len(found) for found in texts], dtype=torch.int64)
    return tokens_BNU, token_lens_BN, frame_mask(found_B, num_texts)
