"""CTC greedy search: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import BLANK_ID, Hypothesis, ModelOutput, Options, TokenTable


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
        log_probs_BT, ids_BT = out.logits[self.head].float().log_softmax(-1).max(-1)
        previous_BT = torch.nn.functional.pad(ids_BT[:, :-1], (1, 0), value=BLANK_ID)
        frames_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        valid_BT = frames_T < out.lens_B.to(ids_BT.device)[:, None]
        starts_BT = valid_BT & (ids_BT != BLANK_ID) & (ids_BT != previous_BT)
        scores_B = (log_probs_BT * valid_BT).sum(-1).tolist()
        hypotheses = []
        for ids_T, starts_T, score in zip(ids_BT, starts_BT, scores_B, strict=True):
            frames = starts_T.nonzero().flatten()
            ids = ids_T[frames].tolist()
            times_s = [frame * self.frame_shift_s for frame in frames.tolist()]
            hypotheses.append(Hypothesis(self.tokens.decode(ids), ids, times_s, score))
        return hypotheses


@hookimpl
def register_decoders(register):
    register("ctc_greedy", CtcGreedy)
