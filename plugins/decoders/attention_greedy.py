"""Attention greedy search: the best token after those before it, until the sentence ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import Hypothesis, ModelOutput, Options, TokenTable


class AttentionGreedy:
    """Best path of the ``attention`` head. Args: tokens of the bundle; seconds per encoder frame.

    The head knows no times: hypotheses come without.
    """

    head = "attention"

    class Config(Options):
        """Nothing to choose."""

    def __init__(self, config: Config, tokens: TokenTable, frame_shift_s: float) -> None:
        self.config = config
        self.tokens = tokens

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is the log-probability of its tokens."""
        head: Any = model.get_submodule(f"heads.{self.head}")
        rows, scores_B = head.best_path(out.hidden_BTD, out.lens_B)
        return [
            Hypothesis(self.tokens.decode(row), row, score=score)
            for row, score in zip(rows, scores_B.tolist(), strict=True)
        ]


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("attention_greedy", AttentionGreedy)
