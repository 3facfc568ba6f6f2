"""How long a run takes, estimated from the times of earlier runs of its jobs."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kdrecipe.jobs.stamps import Job
from kdrecipe.report.reading import duration

_ENOUGH_S = 5.0  # time of finished jobs that is needed to compare the speed of this run with earlier ones


@dataclass
class Forecast:
    """How much of a run is left.

    Args:
        jobs: those that will run, in the plan's order.
        seconds: how long they took before, by name; without jobs that have never run.
        num_jobs: number of processes side by side.
    """

    jobs: Sequence[Job]
    seconds: Mapping[str, float]
    num_jobs: int = 1
    _done: set[str] = field(default_factory=set, init=False)
    _expected_s: float = field(default=0.0, init=False)
    _took_s: float = field(default=0.0, init=False)

    def done(self, job: Job, seconds: float | None) -> None:
        """Note that a job is finished; ``seconds``: how long it took, None if it was skipped."""
        self._done.add(job.name)
        if seconds is not None and job.name in self.seconds:
            self._expected_s += self.seconds[job.name]
            self._took_s += seconds

    @property
    def left(self) -> list[Job]:
        """Jobs that are not finished."""
        return [job for job in self.jobs if job.name not in self._done]

    @property
    def progress(self) -> str:
        """``3 of 20 jobs done, about 12 min left``."""
        text = f"{len(self._done)} of {len(self.jobs)} jobs done"
        left = self.text()
        return f"{text}, {left} left" if left and self.left else text

    def text(self) -> str:
        """``about 12 min``; ``at least 12 min`` if some jobs were never timed; empty if none was."""
        known = [job for job in self.left if job.name in self.seconds]
        if not known:
            return ""
        seconds = span_s(self.left, self.seconds, self.num_jobs)
        if self._expected_s > _ENOUGH_S:
            seconds *= self._took_s / self._expected_s
        return f"{'about' if len(known) == len(self.left) else 'at least'} {duration(seconds)}"


def span_s(jobs: Sequence[Job], seconds: Mapping[str, float], num_jobs: int) -> float:
    """Seconds until all jobs are finished, if they start in the order of :class:`kdrecipe.jobs.run.Run`.

    Args:
        jobs: in the plan's order.
        seconds: of each, by name; a job that is missing counts as 0.
        num_jobs: number of processes side by side.
    """
    queue = list(jobs)
    running: list[tuple[float, str]] = []  # a heap of (end, name)
    now = 0.0
    while queue or running:
        waiting = {job.name for job in queue} | {name for _, name in running}
        job = next((job for job in queue if not waiting & set(job.needs)), None)
        here = job is not None and (job.alone or num_jobs == 1)
        if job is None or (running and (here or len(running) >= num_jobs)):
            now, _ = heapq.heappop(running)
            continue
        queue.remove(job)
        if here:
            now += seconds.get(job.name, 0.0)
        else:
            heapq.heappush(running, (now + seconds.get(job.name, 0.0), job.name))
    return now
