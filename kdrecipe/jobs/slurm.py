"""Jobs as Slurm array jobs, through submitit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import KdrecipeError, MissingExtra
from kdrecipe.jobs.elsewhere import LogReader, run_command

if TYPE_CHECKING:
    from kdrecipe.recipe.executor import SlurmOptions

_EVERY_S = 1.0
"""Between two looks at the queue; submitit asks Slurm less often than that."""


class SlurmJobs:
    """Jobs in Slurm's queue. Those that become ready at the same time are one array.

    Args:
        options: partition, time and so on.
        directory: for submitit's files and the jobs' logs; seen by all machines.
        relay: called with a job's name and each line that it prints.

    Raises:
        MissingExtra: submitit is not installed.
        KdrecipeError: there is no Slurm here.
    """

    shares_machine = False
    full = False

    def __init__(self, options: SlurmOptions, directory: Path, relay: Callable[[str, str], None]) -> None:
        try:
            import submitit
        except ImportError:
            install = "pip install 'kdrecipe[slurm]'"
            raise MissingExtra("submitit", "--executor slurm", install) from None
        self._logs = LogReader(directory / "logs", relay)
        try:
            self._executor = submitit.AutoExecutor(directory / "slurm", cluster=options.cluster)
        except RuntimeError as error:
            raise KdrecipeError(
                f"Slurm can't be used here: {error}",
                where="--executor slurm",
                remedy="run it where sbatch is (a login node), or try it with --set executor.cluster=local",
            ) from error
        self._executor.update_parameters(**_parameters(options))
        self.running: dict[str, Any] = {}
        self._ready: list[tuple[str, Sequence[str]]] = []
        self._looked_at = 0.0

    def start(self, name: str, command: Sequence[str]) -> None:
        """Put a job on the list of those to be submitted at the next look."""
        self._ready.append((name, command))
        self.running[name] = None

    def where(self, name: str) -> str:
        """``Slurm 4711_3 PENDING``."""
        job = self.running[name]
        return f"Slurm {job.job_id} {job.state}" if job is not None else "about to be submitted"

    def finished(self) -> list[tuple[str, int | None, float]]:
        """Name, exit status and seconds of every job that has ended; None: it was lost with its machine."""
        self._submit()
        if time.monotonic() - self._looked_at < _EVERY_S:
            return []
        self._looked_at = time.monotonic()
        ended: list[tuple[str, int | None, float]] = []
        for name, job in list(self.running.items()):
            self._logs.read(name)
            if not job.done():
                continue
            self._logs.read(name)
            del self.running[name]
            began = job.paths.submitted_pickle.stat().st_mtime if job.paths.submitted_pickle.exists() else 0
            seconds = max(0.0, time.time() - began) if began else 0.0
            ended.append((name, None if job.exception() is not None else int(job.result()), seconds))
        return ended

    def _submit(self) -> None:
        if not self._ready:
            return
        try:
            with self._executor.batch():
                jobs = [
                    self._executor.submit(run_command, list(command), str(self._logs.begin(name)), {})
                    for name, command in self._ready
                ]
        except Exception as error:  # submitit's own, or that of sbatch
            raise KdrecipeError(
                f"Slurm does not take jobs: {error}",
                where="--executor slurm",
                remedy="correct partition, account, time_min or what it names; the same command resumes",
            ) from error
        self.running |= {name: job for (name, _), job in zip(self._ready, jobs, strict=True)}
        self._ready.clear()

    def stop(self) -> None:
        """Cancel all that are queued or run."""
        for job in self.running.values():
            if job is not None:
                job.cancel(check=False)
        self.running.clear()


def _parameters(options: SlurmOptions) -> dict[str, Any]:
    common = {"name": "kdrecipe", "timeout_min": options.time_min, "cpus_per_task": options.cpus}
    common["gpus_per_node"] = options.gpus or None
    if options.cluster == "local":
        return {**common, "mem_gb": options.memory_gb}
    named = {"partition": options.partition, "account": options.account}
    return {
        **common,
        "mem_gb": options.memory_gb,
        "slurm_array_parallelism": options.at_most,
        **{f"slurm_{key}": value for key, value in named.items() if value is not None},
        **({"slurm_additional_parameters": dict(options.more)} if options.more else {}),
    }
