"""Connectionist temporal classification (Graves et al. 2006): head, loss and greedy search.

B utterances, T frames, U tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import ctc_greedy, ctc_nll, frames_needed
from kdrecipe.interfaces import (
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    TargetKind,
    Targets,
    TargetSpec,
)


class CtcHeadOptions(Options):
    """Options of ``heads: {ctc: {...}}``.

    Args:
        dropout: before the linear map.
        rank: of that map, made of two through so many dimensions: fewer parameters where there are thousands
            of tokens; by default one map.
    """

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rank: int | None = Field(default=None, ge=1)


class CtcHead(nn.Module):
    """A linear map from hidden states to (unnormalised) log-posteriors.

    Args:
        config: its options.
        input_dim: D.
        vocab_size: V, the blank included.
    """

    Config: ClassVar[type[Options]] = CtcHeadOptions
    target_kinds: ClassVar[tuple[TargetKind, ...]] = ("frame_logits", "hypotheses")
    free_options: ClassVar[tuple[str, ...]] = ("dropout",)

    def __init__(self, config: CtcHeadOptions, input_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.dropout = nn.Dropout(config.dropout)
        self.narrow = nn.Linear(input_dim, config.rank, bias=False) if config.rank else nn.Identity()
        self.proj = nn.Linear(config.rank or input_dim, vocab_size)

    def forward(self, hidden_BTD: Tensor, lens_B: Tensor, batch: Batch | None = None) -> Tensor:
        """(B, T, D) to (B, T, V) logits."""
        logits_BTV: Tensor = self.proj(self.narrow(self.dropout(hidden_BTD)))
        return logits_BTV

    def reads(self) -> list[str]:
        """The layer that reads the encoder's output."""
        return ["proj" if isinstance(self.narrow, nn.Identity) else "narrow"]

    def greedy(self, hidden_BTD: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Tokens of each utterance's best path."""
        return ctc_greedy(self(hidden_BTD, lens_B), lens_B)[0]


class CtcLossOptions(Options):
    """Options of ``{name: ctc}``: none."""


class CtcLoss:
    """Negative log-likelihood of the transcripts, summed over utterances; counted in label tokens.

    Utterances with fewer frames than their text needs have an infinite loss: they add nothing to
    the total and are counted by the metric ``infeasible``. Unlabelled and empty ones are left out.

    Args:
        config: its options.
        setup: the models it works between; the student must have the head.

    Raises:
        RecipeError: the student has no head ``ctc``.
    """

    Config: ClassVar[type[Options]] = CtcLossOptions
    supervised = True

    def __init__(self, config: CtcLossOptions, setup: LossSetup | None = None) -> None:
        self.config = config
        if setup is not None:
            setup.require_head("ctc", "ctc")

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Nothing from a teacher."""
        return []

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Total in nats, count in tokens."""
        used_B = batch.labelled_B & (batch.token_lens_B > 0)
        nll_B = ctc_nll(out.logits["ctc"], out.lens_B, batch.tokens_BU, batch.token_lens_B)
        infeasible_B = used_B & (out.lens_B < frames_needed(batch.tokens_BU, batch.token_lens_B))
        # not a product with the mask: what is left out must not bring NaN along
        total = nll_B.where(used_B, torch.zeros_like(nll_B)).sum()
        count = batch.token_lens_B.where(used_B, torch.zeros_like(batch.token_lens_B)).sum()
        return LossOutput(total, count, {"infeasible": infeasible_B.sum()})


@hookimpl
def register_heads(register: Callable[[str, type], None]) -> None:
    """Offer the head ``ctc``."""
    register("ctc", CtcHead)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Offer the loss ``ctc``."""
    register("ctc", CtcLoss)
