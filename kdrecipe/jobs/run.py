"""Runs the jobs of a plan that have a reason to, several at a time.

Jobs that do not depend on each other run side by side in separate processes: two small
students on one core each finish far sooner than one after the other on both.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrecipe.errors import KdrecipeError, TrainingError
from kdrecipe.jobs.elsewhere import here
from kdrecipe.jobs.executors import Executor, Processes
from kdrecipe.jobs.forecast import Forecast
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job, run_job, why_run
from kdrecipe.jobs.watch import EVERY_S, RUN_FILE, put

_AGAIN = 2  # times that a job is given out again after it was lost


@dataclass
class Run:
    """One invocation: the queue, and the processes at work.

    Args:
        plan: all jobs, also those that are not selected.
        selected: jobs to run or to skip, in the plan's order.
        reasons: why each runs, by name; the others are up to date.
        verbs: name of each stage, for what is printed.
        command: the command that runs one job in a separate process.
        num_jobs: processes side by side.
        force: run also what turns out to be up to date.
        forecast: is told what is done, and tells what is left.
        work: does a job that runs in this process, given its directory; None: the job's own ``run``.
        executor: makes what runs the others, given what to call with each job's name and lines; None:
            processes on this machine.
        root: work directory, which gets ``.run.json``; None: it is not written.
    """

    plan: Plan
    selected: Sequence[Job]
    reasons: Mapping[str, str]
    verbs: Sequence[str]
    command: Callable[[Job], Sequence[str]]
    num_jobs: int = 1
    force: bool = False
    forecast: Forecast | None = None
    work: Callable[[Job, Path], None] | None = None
    executor: Callable[[Callable[[str, str], None]], Executor] | None = None
    root: Path | None = None
    bar: Any = field(default=None, init=False)
    processes: Executor = field(init=False)
    failed: dict[str, int] = field(default_factory=dict, init=False)  # job -> exit status
    lost: dict[str, int] = field(default_factory=dict, init=False)  # job -> how often
    _states: dict[str, str] = field(default_factory=dict, init=False)
    _since: float = field(default_factory=time.time, init=False)
    _written_at: float = field(default=0.0, init=False)

    def run(self) -> None:
        """Run all that has a reason to.

        Raises:
            KdrecipeError: at least one job failed; the others were allowed to finish.
        """
        self._print_skipped()
        queue = [j for j in self.selected if j.name in self.reasons]
        self._states = {j.name: "waiting" for j in queue}
        make = self.executor or (lambda relay: Processes(self.num_jobs, relay))
        self.processes = make(self._relay)
        if sys.stdout.isatty() and self.num_jobs > 1 and queue:
            from tqdm import tqdm

            self.bar = tqdm(total=len(queue), unit="job", dynamic_ncols=True, file=sys.stdout)
        try:
            while queue or self.processes.running:
                self._reap()
                started = False if self.failed else self._start_next(queue)
                if self.failed and not self.processes.running:
                    break
                self._write_state()
                if not started and self.processes.running:
                    time.sleep(0.1)
        finally:
            self.processes.stop()
            self._write_state(ended=True)
            if self.bar is not None:
                self.bar.close()
        if self.failed:
            only_bad_input = set(self.failed.values()) == {2}  # else the work failed: exit status 1
            raise (KdrecipeError if only_bad_input else TrainingError)(
                f"failed: {', '.join(self.failed)} (messages above)",
                remedy="fix the cause and give the same command: finished work is kept",
            )

    def _print_skipped(self) -> None:
        skipped = [j for j in self.selected if j.name not in self.reasons]
        for stage in sorted({j.stage for j in skipped}):
            names = [j.name for j in skipped if j.stage == stage]
            shown = names[0] if len(names) == 1 else f"{len(names)} jobs"
            print(f"stage {stage} {self.verbs[stage]}: {shown} up to date, skipped")

    def _start_next(self, queue: list[Job]) -> bool:
        waiting = {j.name for j in queue} | set(self.processes.running)
        for job in queue:
            if any(need in waiting for need in job.needs):
                continue
            by_itself = self.processes.shares_machine and (job.alone or self.num_jobs == 1)
            if self.processes.running and (by_itself or self.processes.full):
                return False
            queue.remove(job)
            if not self.force and why_run(job, self.plan.jobs) is None:
                # What it needs was made again and came out the same.
                self._note(job, None)
                self._say(job, "up to date after all, skipped")
            elif by_itself:
                self._say(job, f"... ({self.reasons[job.name]})")
                self._states[job.name] = "running"
                self._write_state(now=True)
                self._done(job, run_job(job, self.plan.jobs, self.work))
            else:
                self._say(job, f"... ({self.reasons[job.name]})")
                self._start(job)
            return True
        return False

    def _start(self, job: Job) -> None:
        self._states[job.name] = "running"
        self.processes.start(job.name, self.command(job))

    def _reap(self) -> None:
        for name, status, seconds in self.processes.finished():
            job = self.plan.jobs[name]
            lost = status is None or status < 0
            if lost and why_run(job, self.plan.jobs) is None:
                status = 0  # it had finished before
            elif lost and self.lost.get(name, 0) < _AGAIN and not self.failed:
                self.lost[name] = self.lost.get(name, 0) + 1
                self._say(job, f"... (its process was {_ended_by(status)}; again)")
                self._start(job)
                continue
            if status != 0:
                self.failed[name] = 1 if status is None else status
                self._states[name] = "failed"
                self._say(job, f"FAILED ({_ended_by(status)})")
            else:
                self._done(job, seconds)

    def _done(self, job: Job, seconds: float) -> None:
        self._note(job, seconds)
        progress = f"; {self.forecast.progress}" if self.forecast else ""
        self._say(job, f"done in {_duration(seconds)}{progress}")

    def _note(self, job: Job, seconds: float | None) -> None:
        self._states[job.name] = "done" if seconds is not None else "up to date"
        if self.forecast:
            self.forecast.done(job, seconds)

    def _say(self, job: Job, text: str) -> None:
        self._print(f"stage {job.stage} {self.verbs[job.stage]}: {job.name} {text}")
        if self.bar is not None and not text.startswith("..."):
            self.bar.update()

    def _write_state(self, ended: bool = False, now: bool = False) -> None:
        """Write ``.run.json``, now and then."""
        if self.root is None or not (ended or now or time.monotonic() - self._written_at >= EVERY_S):
            return
        self._written_at = time.monotonic()
        running = self.processes.running
        jobs = {
            name: {"state": state, "where": self.processes.where(name) if name in running else ""}
            for name, state in self._states.items()
        }
        left = self.forecast.progress if self.forecast else ""
        about = {"where": here(), "since": self._since, "left": left, "ended": ended, "jobs": jobs}
        with contextlib.suppress(OSError):  # the disk is full: what matters more will say so
            put(self.root / RUN_FILE, about)

    def _print(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def _relay(self, name: str, line: str) -> None:
        """Pass on what a process says; on a terminal its progress is the bar's."""
        if self.bar is not None and line.startswith(("step ", "epoch ")):
            self.bar.set_postfix_str(f"{name} {line}")
        else:
            self._print(f"  [{name}] {line}")


def _ended_by(status: int | None) -> str:
    if status is None:
        return "lost with its machine"
    return f"exit {status}" if status >= 0 else f"killed by signal {-status}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
