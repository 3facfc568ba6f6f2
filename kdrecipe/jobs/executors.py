"""Where jobs run. Here: each in a separate process, with a share of the machine's threads and one GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from kdrecipe.data.memory import CACHE_GB, PROCESSES, machine_budget

PARENT = "KDRECIPE_PARENT"
"""Environment variable that a job's process finds its parent's number in."""


def job_label(name: str) -> str:
    """``name``, or nothing in a process beside others: the one that started it says whose lines these are."""
    return "" if os.environ.get(PARENT) else name


def num_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def set_threads() -> None:
    """Give torch as many threads as ``KDRECIPE_THREADS`` says, if it says anything."""
    threads = os.environ.get("KDRECIPE_THREADS")
    if threads:
        import torch

        torch.set_num_threads(int(threads))


def die_with_parent() -> None:
    """Have Linux end this process with the one that started it, so that none keeps training unnoticed."""
    if parent := os.environ.get(PARENT):
        die_with(int(parent))


def die_with(parent: int) -> None:
    """Have Linux end this process with its parent, the process of that number."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)


class Executor(Protocol):
    """Runs the commands of jobs, several at a time."""

    @property
    def running(self) -> Mapping[str, Any]:
        """The jobs at work or queued, by name."""

    @property
    def shares_machine(self) -> bool:
        """Whether jobs are on this machine, so that one that measures time must be alone."""

    @property
    def full(self) -> bool:
        """Whether no further job may be started now."""

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start ``command`` for the job ``name``."""

    def where(self, name: str) -> str:
        """Where a running job is, in a few words."""

    def finished(self) -> Sequence[tuple[str, int | None, float]]:
        """Name, exit status and seconds of every job that has ended since the last call; None or below 0: it
        did not end by itself."""

    def stop(self) -> None:
        """End all that still run."""


@dataclass
class JobProcess:
    """A job in a separate process."""

    process: subprocess.Popen[str]
    reader: threading.Thread
    gpu: int
    start: float = field(default_factory=time.monotonic)


@dataclass
class Processes:
    """The processes at work, at most ``limit`` at a time.

    Args:
        limit: how many, at least 1; each gets an equal share of the cores and of the memory.
        relay: called with a job's name and each line that its process prints.
        cache_bytes: memory for features and targets of all of them together.
    """

    limit: int
    relay: Callable[[str, str], None]
    cache_bytes: int = field(default_factory=machine_budget)
    running: dict[str, JobProcess] = field(default_factory=dict)
    shares_machine: ClassVar[bool] = True

    @property
    def full(self) -> bool:
        """Whether no further process may be started now."""
        return len(self.running) >= self.limit

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start ``command`` for the job ``name``."""
        threads = os.environ.get("KDRECIPE_THREADS") or str(max(1, (os.cpu_count() or 1) // self.limit))
        env = {
            **os.environ,
            "KDRECIPE_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            PARENT: str(os.getpid()),
            CACHE_GB: str(self.cache_bytes / 1e9),
            PROCESSES: str(self.limit),
        }
        gpus = num_gpus()
        taken = [one.gpu for one in self.running.values()]
        gpu = min(range(max(1, gpus)), key=taken.count)
        if gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        reader = threading.Thread(target=self._read, args=(process, name), daemon=True)
        reader.start()
        self.running[name] = JobProcess(process, reader, gpu)

    def _read(self, process: subprocess.Popen[str], name: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.relay(name, line.rstrip())

    def where(self, name: str) -> str:
        """``process 4711``."""
        return f"process {self.running[name].process.pid}"

    def finished(self) -> list[tuple[str, int | None, float]]:
        """Name, exit status and seconds of every process that has ended since the last call."""
        ended: list[tuple[str, int | None, float]] = []
        for name, one in list(self.running.items()):
            if one.process.poll() is None:
                continue
            one.reader.join()
            del self.running[name]
            ended.append((name, one.process.returncode, time.monotonic() - one.start))
        return ended

    def stop(self) -> None:
        """End all that still run."""
        for one in self.running.values():
            one.process.terminate()
        for one in self.running.values():
            one.process.wait()
            one.reader.join()
