"""What the exporters of CTC models share: the exported signature, checks, and the token list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import BundleLike

HEAD = "ctc"


class CtcLogProbs(nn.Module):
    """The signature of an export: ``(x (N, T, F), x_lens (N,)) -> (log_probs (N, T', V), lens (N,))``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(x, x_lens)
        return out.logits[HEAD].log_softmax(-1), out.lens_B


def check_head(bundle: BundleLike, exporter: str) -> None:
    """KdrecipeError unless the bundle's model has a CTC head."""
    heads: Any = bundle.model.heads
    if HEAD not in heads:
        raise KdrecipeError(
            f"{exporter} exports the head {HEAD!r}, the model has {', '.join(heads)}",
            where=bundle.name,
            remedy="train the system with heads: {ctc: {}}",
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


def read_pieces(path: Path) -> list[str]:
    """The tokens of a ``tokens.txt`` by id."""
    lines = existing(path).read_text(encoding="utf-8").splitlines()
    by_id = {int(number): piece for piece, _, number in (line.rpartition(" ") for line in lines)}
    return [by_id[i] for i in range(len(by_id))]
