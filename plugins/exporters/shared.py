"""What exporters share: parts of a model, checks, and the token list."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.frames import ctc_greedy
from kdrecipe.interfaces import BundleLike
from kdrecipe.text import WORD_START


class Encode(nn.Module):
    """Norm and encoder of a model, without its heads: ``(x (N, T, F), x_lens (N,)) -> (N, T', D), (N,)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = model.get_submodule("norm")
        self.encoder = model.get_submodule("encoder")

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NTD, lens_N = self.encoder(self.norm(x), x_lens)
        return hidden_NTD, lens_N


class CtcLogProbs(nn.Module):
    """The signature of a CTC export: ``(x (N, T, F), x_lens (N,)) -> (log_probs (N, T', V), lens (N,))``.

    Nothing of the model's other heads is in it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encode = Encode(model)
        self.head = model.get_submodule("heads.ctc")

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NTD, lens_N = self.encode(x, x_lens)
        return self.head(hidden_NTD, lens_N).log_softmax(-1), lens_N


def check_head(bundle: BundleLike, head: str, exporter: str) -> None:
    """KdrecipeError unless the bundle's model has ``head``."""
    heads: Any = bundle.model.heads
    if head not in heads:
        raise KdrecipeError(
            f"{exporter} exports the head {head!r}, the model has {', '.join(heads)}",
            where=bundle.name,
            remedy=f"train the system with heads: {{{head}: {{}}}}",
        )


def existing(path: Path) -> Path:
    """``path``; KdrecipeError if there is no such file."""
    if not path.is_file():
        raise KdrecipeError(
            "there is no such file",
            where=str(path),
            remedy="give what the export stage wrote: the model with its tokens.txt beside it",
        )
    return path


def join_pieces(pieces: Iterable[str]) -> str:
    """The text that pieces spell."""
    return "".join(pieces).replace(WORD_START, " ").strip()


def best_path(log_probs_TV: np.ndarray) -> tuple[list[int], list[int]]:
    """CTC's greedy search on one utterance: tokens, and the frame at which each begins."""
    tokens, frames = ctc_greedy(torch.from_numpy(log_probs_TV[None]), torch.tensor([len(log_probs_TV)]))
    return tokens[0], frames[0]


def valid_rows(batch: np.ndarray, lens_B: np.ndarray) -> list[np.ndarray]:
    """The valid part of each row."""
    return [row[:length] for row, length in zip(batch, lens_B, strict=True)]
