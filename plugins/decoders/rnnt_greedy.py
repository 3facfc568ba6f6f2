"""Transducer greedy search: the best token of every frame, as sherpa-onnx searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import Hypothesis, ModelOutput, Options, TokenTable


class RnntGreedy:
    """Best path of the ``rnnt`` head, at most one token per frame. Args: tokens; seconds per frame."""

    head = "rnnt"

    class Config(Options):
        """Nothing to choose."""

    def __init__(self, config: Config, tokens: TokenTable, frame_shift_s: float) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is the log-probability of the best path."""
        head: Any = model.get_submodule(f"heads.{self.head}")
        rows, frames, scores_B = head.best_path(out.hidden_BTD, out.lens_B)
        return [
            Hypothesis(self.tokens.decode(row), row, [frame * self.frame_shift_s for frame in at], score)
            for row, at, score in zip(rows, frames, scores_B.tolist(), strict=True)
        ]


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("rnnt_greedy", RnntGreedy)
