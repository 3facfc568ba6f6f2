"""Features and targets kept in memory: one budget for a machine, shared among the processes on it.

``KDRECIPE_CACHE_GB`` sets the machine's budget; without it, it is half of the memory that is available
when the work starts. ``kdrecipe run`` measures it once and passes it to the processes that it starts.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from kdrecipe.errors import KdrecipeError

CACHE_GB = "KDRECIPE_CACHE_GB"
PROCESSES = "KDRECIPE_PROCESSES"
"""Processes that share the budget; set by ``kdrecipe run`` for those that it starts."""

SHARE = 0.5  # of the available memory: the models, their gradients and the page cache need the rest

Value = TypeVar("Value")


class MemoryBudget:
    """Bytes that may be kept, first come, first served, and given back when no longer needed."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def take(self, num_bytes: int) -> bool:
        """Take that much; False, and nothing is taken, if it is not left."""
        if num_bytes > self.left:
            return False
        self.left -= num_bytes
        return True


class Kept(Generic[Value]):
    """Values kept in memory while a budget lasts; what they took is free again when this object goes.

    Args:
        budget: None: that of this process.
    """

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self._budget = process_budget() if budget is None else budget
        self._values: dict[object, Value] = {}
        self._taken = [0]
        weakref.finalize(self, _give_back, self._budget, self._taken)

    def get(self, key: object) -> Value | None:
        """The value, None if it is not kept."""
        return self._values.get(key)

    def offer(self, key: object, value: Value, num_bytes: int) -> None:
        """Keep a value if there is memory left for it."""
        if self._budget.take(num_bytes):
            self._taken[0] += num_bytes
            self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)


def _give_back(budget: MemoryBudget, taken: list[int]) -> None:
    budget.left += taken[0]


@functools.cache
def process_budget() -> MemoryBudget:
    """This process's share of the machine's budget."""
    return MemoryBudget(machine_budget() // num_processes(os.environ))


def num_processes(env: Mapping[str, str]) -> int:
    """Processes that share this machine's budget: jobs side by side, each maybe on several GPUs."""
    jobs, ranks = (_count(env.get(name)) for name in (PROCESSES, "LOCAL_WORLD_SIZE"))
    return jobs * ranks


def _count(text: str | None) -> int:
    return max(1, int(text)) if text and text.isdecimal() else 1


def machine_budget(env: Mapping[str, str] = os.environ) -> int:
    """Bytes for features and targets on this machine.

    Raises:
        KdrecipeError: KDRECIPE_CACHE_GB is not a number of 0 or more.
    """
    text = env.get(CACHE_GB, "").strip()
    if not text:
        return int(SHARE * available_bytes())
    try:
        budget_gb = float(text)
    except ValueError:
        budget_gb = -1.0
    if not 0 <= budget_gb < 1e6:
        raise KdrecipeError(
            f"{CACHE_GB} is {text!r}, not a number of gigabytes",
            remedy=f"for example {CACHE_GB}=4, for all processes together; 0 keeps nothing",
        )
    return int(budget_gb * 1e9)


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of this process's control group."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        free = int(fields.get("MemAvailable", fields["MemFree"]).split()[0]) * 1024
    else:  # not Linux: the machine's memory
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, min([free, *_group_limits()]))


def _group_limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left within the limits of a container, of either version of control groups."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes",) * 2):
        try:
            most = int((root / limit).read_text())
            now = int((root / used.replace("limit_in", "usage_in")).read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        yield most - now
