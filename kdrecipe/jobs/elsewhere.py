"""Jobs on other machines: a command that runs there, and what it says brought back.

All machines see the same files. What a command says goes into a file of ``logs/``, which the process that
started it reads. The stamp says that a job is done, whoever did it: a job that was given to a machine twice
is found finished the second time, and two at once are kept apart by the job's lock.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdrecipe.jobs.executors import PARENT


def run_command(command: Sequence[str], log: str, env: Mapping[str, str]) -> int:
    """Run ``command`` here, what it says appended to the file ``log``; returns its exit status."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_PROCID", "SLURM_NTASKS"))}
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command,
            env={**inherited, **env, PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        return process.wait()


def here() -> str:
    """This machine and process, ``node7:1234``, with the job's number on a cluster."""
    slurm = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{socket.gethostname()}:{os.getpid()}"
    return f"{name} (Slurm {slurm}{'_' + task if task else ''})" if slurm else name


class LogReader:
    """New whole lines of the files that jobs write.

    Args:
        directory: of the files; made if it is not there.
        relay: called with a job's name and each line.
    """

    def __init__(self, directory: Path, relay: Callable[[str, str], None]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._relay = relay
        self._read: dict[str, int] = {}

    def begin(self, name: str) -> Path:
        """The file of a job, of which only what is written from now on counts."""
        path = self.directory / (name.replace("/", "_") + ".log")
        path.touch()
        self._read[name] = path.stat().st_size
        return path

    def read(self, name: str) -> None:
        """Pass on what is new of a job."""
        path = self.directory / (name.replace("/", "_") + ".log")
        with open(path, "rb") as file:
            file.seek(self._read[name])
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read[name] += len(whole) + len(newline)
        for line in whole.decode("utf-8", "replace").splitlines():
            self._relay(name, line.rstrip())


def with_torchrun(command: Sequence[str], nproc: int) -> list[str]:
    """``python -m kdrecipe.cli ...`` in so many processes that train together."""
    python, *rest = command
    assert python == sys.executable
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    return [*launcher, *rest] if nproc > 1 else list(command)
