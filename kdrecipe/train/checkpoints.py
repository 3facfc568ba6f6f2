"""The state of an unfinished run: ``checkpoints/last.pt``, whole or absent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import TrainingError


class Checkpoints:
    """The checkpoints of one run.

    Args:
        work_dir: of the run; they are in ``checkpoints`` below it.
    """

    def __init__(self, work_dir: Path) -> None:
        self.directory = work_dir / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.directory / "last.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the newest state.

        Raises:
            KdrecipeError: the disk is full; the state before stays.
        """
        _write(self.last, state)

    def load(self) -> dict[str, Any] | None:
        """The newest state, tensors on the CPU; None if there is none."""
        return _read(self.last) if self.last.exists() else None

    def clear(self) -> None:
        """Delete all of them."""
        for path in self.directory.glob("*.pt"):
            path.unlink()


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
