"""CTC greedy search: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.frames import ctc_greedy, frame_mask
from kdrecipe.interfaces import Hypothesis, ModelOutput, Options, TokenTable


class CtcGreedy:
    """Best path of the ``ctc`` head. Args: tokens of the bundle; seconds per encoder frame."""

    head = "ctc"

    class Config(Options):
        """Nothing to choose."""

    def __init__(self, config: Config, tokens: TokenTable, frame_shift_s: float) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is the log-probability of the best path."""
        log_probs_BTV = out.logits[self.head].float().log_softmax(-1)
        rows, frames = ctc_greedy(log_probs_BTV, out.lens_B)
        best_BT = log_probs_BTV.max(-1).values
        scores_B = (best_BT * frame_mask(out.lens_B, best_BT.shape[1])).sum(-1)
        return [
            Hypothesis(self.tokens.decode(row), row, [frame * self.frame_shift_s for frame in at], score)
            for row, at, score in zip(rows, frames, scores_B.tolist(), strict=True)
        ]


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("ctc_greedy", CtcGreedy)
