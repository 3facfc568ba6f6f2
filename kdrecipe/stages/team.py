"""A recipe under ``torchrun``: the first process runs it, and all of them train.

Stamps, locks and what is printed are the first process's. The others wait for the name of a job in which
all take part, do that job beside it, and wait again. A process that ends takes the others with it;
``torchrun --max-restarts`` starts all of them anew, and training resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from kdrecipe.jobs.executors import die_with
from kdrecipe.jobs.stamps import Job, working_dir
from kdrecipe.train.distribution import Workers, alone

if TYPE_CHECKING:
    pass

_PATIENCE = timedelta(days=365)  # a process waits while the first prepares a corpus


class Team:
    """The processes that ``torchrun`` started, this one among them.

    Raises:
        KdrecipeError: they can't work together: a GPU is missing, or NCCL.
    """

    def __init__(self) -> None:
        die_with(os.getppid())
        self.workers = Workers.from_environment()
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.workers.is_first

    # ------------------------------------------------------------ the first process

    def work(self, job: Job, directory: Path) -> None:
        """Do a job in ``directory``, with the others where all take part."""
        if not job.together:
            with alone():
                job.run(directory)
            return
        with _quiet_end():
            self._say(job.name)
            job.run(directory)
            self._meet()

    def dismiss(self) -> None:
        """Let the others end: there is nothing more to do."""
        with _quiet_end():
            self._say(None)
        dist.destroy_process_group()

    # ------------------------------------------------------------ the others

    def follow(self, plan: Callable[[], Mapping[str, Job]]) -> None:
        """Take part in what the first process says, until it has finished.

        Args:
            plan: gives all jobs by name; called once there is something to do, so that only the first process
                says what is wrong with the recipe.
        """
        jobs: Mapping[str, Job] = {}
        with _quiet_end(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            while (name := self._say()) is not None:
                jobs = jobs or plan()
                jobs[name].run(working_dir(jobs[name]))
                self._meet()
        dist.destroy_process_group()

    def _say(self, name: str | None = None) -> str | None:
        """The first process's ``name``, on all."""
        said = [name]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def _meet(self) -> None:
        dist.barrier(group=self._group)


@contextlib.contextmanager
def _quiet_end() -> Iterator[None]:
    """End without a traceback if another process has ended: the cause is in its words."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _PEER_GONE):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"kdrecipe: process {rank} ends, since another one has ended", file=sys.stderr, flush=True)
        # Not a normal exit, which would wait for the others.
        sys.stdout.flush()
        os._exit(1)


_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
