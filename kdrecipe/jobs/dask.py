"""Jobs as tasks of Dask: on this machine, or on the workers of a scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import KdrecipeError, MissingExtra
from kdrecipe.jobs.elsewhere import LogReader, run_command

if TYPE_CHECKING:
    from kdrecipe.recipe.executor import DaskOptions


class DaskTasks:
    """Jobs as tasks, one at a time on each worker.

    A task whose worker dies is given to another one by Dask itself. If that happens time and again, Dask
    takes the task for the cause, and the job is lost.

    Args:
        options: the scheduler's address.
        limit: workers, where they are on this machine.
        directory: for the jobs' logs; seen by all machines.
        relay: called with a job's name and each line that it prints.

    Raises:
        MissingExtra: distributed is not installed.
        KdrecipeError: the scheduler does not answer.
    """

    full = False

    def __init__(
        self, options: DaskOptions, limit: int, directory: Path, relay: Callable[[str, str], None]
    ) -> None:
        try:
            import distributed
        except ImportError:
            install = "pip install 'kdrecipe[dask]'"
            raise MissingExtra("distributed", "--executor dask", install) from None
        self._logs = LogReader(directory / "logs", relay)
        self._address = options.address or "the cluster on this machine"
        self.shares_machine = options.address is None
        self._cluster: Any = None
        if options.address is None:
            self._cluster = distributed.LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=limit, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
            )
        try:
            self.client: Any = distributed.Client(  # type: ignore[no-untyped-call]
                self._cluster or options.address, timeout="30s"
            )
        except OSError as error:
            raise KdrecipeError(
                f"no Dask scheduler answers at {options.address}",
                where="--executor dask",
                remedy="start dask scheduler and dask worker ADDRESS --nthreads 1, or leave out the address",
            ) from error
        self.running: dict[str, Any] = {}
        self._began: dict[str, float] = {}

    def start(self, name: str, command: Sequence[str]) -> None:
        """Submit a job."""
        log = str(self._logs.begin(name))
        # pure=False: a job that is given again is no repetition of the one before.
        self.running[name] = self.client.submit(run_command, list(command), log, {}, pure=False)
        self._began[name] = time.monotonic()

    def where(self, name: str) -> str:
        """``Dask pending``; the job itself says on which machine it is."""
        return f"Dask {self.running[name].status}"

    def finished(self) -> list[tuple[str, int | None, float]]:
        """Name, exit status and seconds of every job that has ended; None: it was lost with its worker.

        Raises:
            KdrecipeError: the scheduler has gone away.
        """
        if self.client.status not in ("running", "connecting") or any(
            future.status == "cancelled" for future in self.running.values()
        ):
            raise KdrecipeError(
                f"the Dask scheduler has gone away ({self._address})",
                where="--executor dask",
                remedy="start it again and give the same command: finished work is kept",
            )
        ended: list[tuple[str, int | None, float]] = []
        for name, future in list(self.running.items()):
            self._logs.read(name)
            if not future.done():
                continue
            self._logs.read(name)
            del self.running[name]
            status = int(future.result()) if future.status == "finished" else None
            ended.append((name, status, time.monotonic() - self._began[name]))
        return ended

    def stop(self) -> None:
        """End all that still run, and the workers on this machine."""
        for future in self.running.values():
            future.cancel(force=True)
        self.client.close(timeout=2)
        if self._cluster is not None:
            self._cluster.close(timeout=10)
