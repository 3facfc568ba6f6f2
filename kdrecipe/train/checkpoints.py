"""Checkpoints: the state of an unfinished run, and the weights of its last epochs.

``checkpoints/last.pt`` is all that is needed to resume; ``checkpoints/epoch-<n>.pt`` (n from 1) are
weights only, to be averaged. Every file is whole or absent.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import TrainingError


class Checkpoints:
    """The checkpoints of one run.

    Args:
        work_dir: of the run; they are in ``checkpoints`` below it.
        keep: weights of how many epochs stay (the number that is averaged).
    """

    def __init__(self, work_dir: Path, keep: int) -> None:
        self.directory = work_dir / "checkpoints"
        self.keep = keep

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.directory / "last.pt"

    def epoch(self, number: int) -> Path:
        """Weights at the end of epoch ``number`` (from 1)."""
        return self.directory / f"epoch-{number}.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the newest state.

        Raises:
            KdrecipeError: the disk is full; the state before stays.
        """
        _write(self.last, state)

    def save_epoch(self, number: int, model: nn.Module) -> None:
        """Write the weights at the end of epoch ``number``."""
        _write(self.epoch(number), model.state_dict())

    def drop_before(self, number: int) -> None:
        """Delete the weights of epochs that no average will need after epoch ``number``."""
        for path in self.directory.glob("epoch-*.pt"):
            if int(path.stem.removeprefix("epoch-")) <= number - self.keep:
                path.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest state, tensors on the CPU; None if there is none."""
        return _read(self.last) if self.last.exists() else None

    def clear(self) -> None:
        """Delete all of them."""
        for path in self.directory.glob("*.pt"):
            path.unlink()

    def average_into(self, model: nn.Module, last_epoch: int) -> None:
        """Give ``model`` the mean of the last epochs' parameters.

        Buffers (masks, running statistics) are the last epoch's: a mean of masks is no mask.
        """
        numbers = range(max(1, last_epoch - self.keep + 1), last_epoch + 1)
        names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        sums: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for number in numbers:
            state = _read(self.epoch(number))
            for name in names:
                value = state[name].double()
                sums[name] = sums[name] + value if name in sums else value
        mean = {name: (total / len(numbers)).to(state[name].dtype) for name, total in sums.items()}
        model.load_state_dict({**state, **mean})


def _write(path: Path, state: dict[str, Any]) -> None:
    # Through memory: torch's own writer reports a full disk as an internal error of its archive.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TrainingError("missing checkpoint", where=str(path), remedy=_REMEDY) from None
    except Exception as error:  # torch raises a different type for every kind of damage
        raise TrainingError(f"damaged checkpoint: {error}", where=str(path), remedy=_REMEDY) from error
    return state


_REMEDY = "delete its directory and run again; training then starts from the beginning"
