"""Runs that will not come back: losses that grow beyond all measure, models that fall silent.

Values that are not finite stop a run at once. The other signs are told by the log and by dev, and a second
one is waited for: a run that is stopped wrongly costs more than some steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kdrecipe.artifacts import replacing
from kdrecipe.errors import TrainingError
from kdrecipe.interfaces import Batch

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import Training

FACTOR, FLOOR = 10.0, 100.0
"""A term explodes above so many times its first value, and above this: a model that starts from another's
weights has a first value near 0, and masks that begin later multiply it."""

SILENT = 0.02
"""Of the reference's tokens; a model that says less has fallen silent."""

_SPOKE = 0.8  # dev token error below which a model had learnt to speak


class Divergence:
    """Watches the values of an objective's terms from one line of the log to the next."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._above: dict[str, int] = {}

    def look(self, terms: Mapping[str, float]) -> str | None:
        """The name of a term that has exploded, twice in a row; None: none has.

        Args:
            terms: value of each since the last look.
        """
        for name, value in terms.items():
            limit = max(FLOOR, FACTOR * abs(self._first.setdefault(name, value)))
            self._above[name] = self._above.get(name, 0) + 1 if abs(value) > limit else 0
        return next((name for name, times in self._above.items() if times >= 2), None)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What a resumed run must know."""
        return {"first": dict(self._first), "above": dict(self._above)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Resume from :meth:`state_dict`."""
        self._first = dict(state["first"])
        self._above = {name: int(times) for name, times in state["above"].items()}


def fell_silent(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a model that could speak has said next to nothing on dev, twice in a row.

    Args:
        history: the log's entries of all epochs, the newest last.
    """
    scored = [e for e in history if e.get("dev_ter") is not None and e.get("dev_said") is not None]
    if len(scored) < 3 or any(e["dev_said"] >= SILENT for e in scored[-2:]):
        return False
    return min(float(e["dev_ter"]) for e in scored[:-2]) < _SPOKE


def stop(
    what: str,
    step: int,
    batches: Sequence[Batch],
    values: Sequence[Mapping[str, float]],
    path: Path,
    options: Training,
) -> NoReturn:
    """Save what this process's last step was computed on, and stop.

    Args:
        what: has happened.
        step: when.
        batches: of the step, in this process; perhaps none.
        values: of each term, by batch.
        path: of the file to be written.
        options: the recipe's ``training``, for the remedy.

    Raises:
        TrainingError: always.
    """
    ids = [i for batch in batches for i in batch.ids]
    if batches:
        content = {"step": step, "losses": values, "batches": [vars(batch) for batch in batches]}
        with replacing(path) as part:
            torch.save(content, part)
    raise TrainingError(
        f"{what} at step {step}; terms: {values}; utterances: {' '.join(ids[:5])}"
        + (" ..." if len(ids) > 5 else ""),
        where=str(path),
        remedy=f"lower training.lr (now {options.lr:g}) or grad_clip (now {options.grad_clip}), lengthen "
        f"warmup_steps (now {options.warmup_steps}), or set precision: fp32 (now {options.precision}); if it "
        "is always this batch, look at its audio and text (torch.load of the file above gives it)",
    )
