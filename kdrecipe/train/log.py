"""What a run says: ``log.jsonl`` for programs, a bar or plain lines for people.

One JSON object per line, ``event`` first: ``step`` (every ``log_every`` steps: step, epoch, loss,
terms, metrics, lr, grad_norm, audio_s_per_s), ``epoch`` (dev_loss, dev_ter, dev_said, seconds, audio_s) and
``end`` (of the averaged weights).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrecipe.artifacts import disk_errors, write_atomic
from kdrecipe.errors import MissingExtra
from kdrecipe.interfaces import LossOutput
from kdrecipe.jobs.watch import tell
from kdrecipe.report.reading import duration
from kdrecipe.text import read_lines

_LINE_EVERY_S = 10.0  # without a terminal: often enough to see that it runs


TENSORBOARD = "KDRECIPE_TENSORBOARD"
"""Environment variable with the folder for TensorBoard's files; without it there are none."""


class TrainLog:
    """``log.jsonl``, to which lines are appended, and TensorBoard's files if they are wanted.

    Those are no part of what a job makes: they hold times and names of machines.

    Args:
        path: the file.
        enabled: False on all processes but the first.
    """

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = path
        self.enabled = enabled
        self._board: Any = None

    def rewind(self, step: int) -> None:
        """Drop lines from after ``step``, which a resumed run will write again."""
        if not self.enabled:
            return
        kept = []
        for line in read_lines(self.path) if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut off by the kill
                break
            if entry["step"] <= step and entry["event"] != "end":
                kept.append(line + "\n")
        write_atomic(self.path, "".join(kept))
        if (folder := os.environ.get(TENSORBOARD)) and self._board is None:
            self._board = _board(Path(folder) / _run_name(self.path), step + 1)

    def write(self, event: str, entry: Mapping[str, Any]) -> None:
        """Append a line."""
        if self.enabled:
            with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **entry}) + "\n")
        if self._board is not None and event != "end":
            for name, value in _numbers(entry):
                self._board.add_scalar(name, value, entry["step"])
            self._board.flush()


def _run_name(path: Path) -> str:
    """``kd/seed1`` of ``.../systems/kd/seed1.partial/train/log.jsonl``."""
    parts = [part.removesuffix(".partial") for part in path.parent.parts]
    after = parts[len(parts) - parts[::-1].index("systems") :] if "systems" in parts else parts[-2:]
    return "/".join(part for part in after if part != "train")


def _board(folder: Path, step: int) -> Any:
    """A writer that takes back what an interrupted run wrote from ``step`` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        install = "pip install 'kdrecipe[tensorboard]'"
        raise MissingExtra("tensorboard", f"{TENSORBOARD}={folder}", install) from None
    return SummaryWriter(str(folder), purge_step=step)  # type: ignore[no-untyped-call]


def _numbers(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """``terms/ctc`` and its value, of all numbers but the step."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)


class Meter:
    """Sums of losses and metrics since the last log line, kept as tensors to spare the GPU a wait."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], outputs: Sequence[LossOutput]) -> None:
        """Add a micro-batch's terms."""
        for name, output in zip(names, outputs, strict=True):
            self._add(f"{name}|total", output.total)
            self._add(f"{name}|count", output.count)
            for metric, value in output.metrics.items():
                self._add(f"{name}|metric|{metric}", value)

    def _add(self, key: str, value: Tensor | float) -> None:
        value = torch.as_tensor(value).detach().double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def numbers(self) -> dict[str, float]:
        """The sums as plain numbers."""
        return {key: float(value) for key, value in self.sums.items()}

    def load(self, numbers: Mapping[str, float]) -> None:
        """Resume from :meth:`numbers`."""
        self.sums = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}

    def clear(self) -> None:
        """Start again."""
        self.sums = {}


def normalised(
    numbers: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[float | None, dict[str, float], dict[str, float]]:
    """(loss, value of each term, metrics) from a meter's sums over all processes.

    Terms that saw nothing have no value; the loss is that of the terms with a weight, None if they have none.
    """
    terms, metrics = {}, {}
    for key, value in numbers.items():
        name, kind, *rest = key.split("|")
        count = numbers.get(f"{name}|count", 0.0)
        if kind == "count" or not count:
            continue
        if kind == "total":
            terms[name] = value / count
        else:
            metrics[f"{name}/{rest[0]}"] = value / count
    counted = [weights[name] * value for name, value in terms.items() if name in weights]
    loss = sum(counted) if counted else None
    return loss, terms, metrics


class Progress:
    """A bar where standard error is a terminal, else a line now and then.

    Args:
        label: what is being worked on; may be empty.
        num_steps: in all, see :meth:`expect`.
        done: steps done before (resumed).
        enabled: False says nothing.
        unit: what a step is called.
    """

    def __init__(
        self, label: str, num_steps: int, done: int = 0, enabled: bool = True, unit: str = "step"
    ) -> None:
        self.label = f"{label}: " if label else ""
        self.unit = unit
        self.num_steps = num_steps
        self._at_most = False
        self.enabled = enabled
        self._said_at = self._began_at = time.monotonic()
        self._done = self._at = done
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=done, desc=label, unit=unit, dynamic_ncols=True)

    def expect(self, num_steps: int, at_most: bool = False) -> None:
        """So many steps in all, or at most so many."""
        self.num_steps, self._at_most = num_steps, at_most
        if self._bar is not None:
            self._bar.total = None if at_most else num_steps
            self._bar.refresh()

    def advance(self, number: int) -> None:
        """So many more steps are done."""
        self.step(self._at + number)

    def step(self, step: int, facts: str = "") -> None:
        """After step ``step``; ``facts`` is what the last log line said."""
        self._at = step
        if self.enabled:
            tell(step, self.num_steps, self.unit, self._at_most, facts)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(facts, refresh=False)
        else:
            of = "" if self._at_most else f"/{self.num_steps}"
            self.note(f"{self.unit} {step}{of}{self._left(step)} {facts}".rstrip())

    def _left(self, step: int) -> str:
        """``, about 3 min left``, by the steps so far; the bar on a terminal tells it by itself."""
        word = "at most" if self._at_most else "about"
        done, left = step - self._done, self.num_steps - step
        seconds = (time.monotonic() - self._began_at) * left / done if done > 0 else 0.0
        return f", {word} {duration(seconds)} left" if seconds >= 1 else ""

    def note(self, text: str) -> None:
        """A separate line, unless there was one a moment ago."""
        if self._bar is not None or time.monotonic() - self._said_at >= _LINE_EVERY_S:
            self.say(text)

    def say(self, text: str) -> None:
        """A separate line."""
        self._said_at = time.monotonic()
        if self._bar is not None:
            self._bar.write(f"{self.label}{text}", file=sys.stderr)
        elif self.enabled:
            print(f"{self.label}{text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
