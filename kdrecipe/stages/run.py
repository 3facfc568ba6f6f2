"""Run stages of a recipe: plan the jobs, say why each runs, run them, several at a time.

The one file of the pipeline that knows all verbs. Training jobs that do not depend on each other
run side by side in processes of their own (``--jobs``): two small students on one core each
finish far sooner than one after the other on both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import KdrecipeError, TrainingError
from kdrecipe.jobs.plan import STAGES, Job, Layout, Plan, locked, run_job, why_run

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe

MAX_JOBS = 8  # more processes than this want a machine and a thought of their own


def build_plan(recipe: Recipe, layout: Layout) -> Plan:
    """All jobs of a recipe, in order."""
    from kdrecipe.stages import (
        compress,
        decode,
        export,
        features,
        lm,
        prepare,
        report,
        score,
        targets,
        tokens,
        train,
    )

    plan = Plan()
    prepare.add_jobs(plan, recipe, layout)
    features.add_jobs(plan, recipe, layout)
    tokens.add_jobs(plan, recipe, layout)
    lm.add_jobs(plan, recipe, layout)
    train.add_teachers(plan, recipe, layout)
    targets.add_jobs(plan, recipe, layout)
    train.add_students(plan, recipe, layout)
    compress.add_jobs(plan, recipe, layout)
    export.add_jobs(plan, recipe, layout)
    decode.add_jobs(plan, recipe, layout)
    score.add_jobs(plan, recipe, layout)
    report.add_jobs(plan, recipe, layout)
    return plan


def run_recipe(
    recipe: Recipe,
    first: int = 0,
    last: int = len(STAGES) - 1,
    *,
    dry_run: bool = False,
    force: bool = False,
    jobs: int | None = None,
    work: Path | None = None,
    job: str | None = None,
) -> None:
    """Run stages ``first`` to ``last``.

    Args:
        recipe: a checked recipe.
        first: number of the first stage.
        last: number of the last stage, included.
        dry_run: only say what would run, and why.
        force: run even what is up to date.
        jobs: processes side by side; None: one per GPU, or one per core up to 8.
        work: directory for everything made; None: see :func:`default_work`.
        job: run this one job and nothing else (what the processes side by side are started with).

    Raises:
        KdrecipeError: a stage failed or its inputs are missing; what was finished stays.
    """
    layout = Layout((work or default_work(recipe)).resolve())
    plan = build_plan(recipe, layout)
    if job is not None:
        _die_with_parent()
        _set_threads()
        run_job(plan.jobs[job], plan.jobs)
        return
    selected = [j for j in plan.jobs.values() if first <= j.stage <= last]
    reasons = plan.reasons(selected, force=force)
    if dry_run:
        _print_dry_run(selected, reasons)
        return
    if selected:
        plan.check_available([j for j in selected if j.name in reasons])
    with locked(layout.root / ".lock", "this recipe"):
        _set_threads()
        _Run(plan, selected, reasons, recipe, layout, _num_jobs(jobs) if reasons else 1, force).run()
    if last == len(STAGES) - 1:
        print(f"report: {_shown(layout.report / 'report.html')}")


def default_work(recipe: Recipe) -> Path:
    """``exp`` beside the recipe, or ``exp-<profile>``, so that a trial never costs a finished run."""
    return recipe.dir / (f"exp-{recipe.profile}" if recipe.profile else "exp")


def _print_dry_run(selected: Sequence[Job], reasons: dict[str, str]) -> None:
    for number, (verb, _) in enumerate(STAGES):
        stage = [j for j in selected if j.stage == number]
        if not stage:
            continue
        print(f"stage {number:2d} {verb}")
        for j in stage:
            print(
                f"    {j.name:34s} {'would run: ' + reasons[j.name] if j.name in reasons else 'up to date'}"
            )


def _num_jobs(jobs: int | None) -> int:
    if jobs is not None:
        return max(1, jobs)
    return _num_gpus() or min(os.cpu_count() or 1, MAX_JOBS)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _set_threads() -> None:
    threads = os.environ.get("KDRECIPE_THREADS")
    if threads:
        import torch

        torch.set_num_threads(int(threads))


def _die_with_parent() -> None:
    """Have Linux end this process with the one that started it, so that none trains on unseen."""
    parent = os.environ.get("KDRECIPE_PARENT")
    if parent and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            raise SystemExit(1)


def _shown(path: Path) -> str:
    """``path`` as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@dataclass
class _Process:
    """A job in a process of its own."""

    process: subprocess.Popen[str]
    reader: threading.Thread
    gpu: int
    start: float = field(default_factory=time.monotonic)


@dataclass
class _Run:
    """One invocation: the queue, and the processes at work."""

    plan: Plan
    selected: list[Job]
    reasons: dict[str, str]
    recipe: Recipe
    layout: Layout
    num_jobs: int
    force: bool
    bar: Any = None
    running: dict[str, _Process] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)  # job -> exit status

    def run(self) -> None:
        """Run all that has a reason to.

        Raises:
            KdrecipeError: at least one job failed; those beside it were let finish.
        """
        skipped = [j for j in self.selected if j.name not in self.reasons]
        for stage in sorted({j.stage for j in skipped}):
            names = [j.name for j in skipped if j.stage == stage]
            shown = names[0] if len(names) == 1 else f"{len(names)} jobs"
            print(f"stage {stage} {STAGES[stage][0]}: {shown} up to date, skipped")
        queue = [j for j in self.selected if j.name in self.reasons]
        if sys.stdout.isatty() and self.num_jobs > 1 and queue:
            from tqdm import tqdm

            self.bar = tqdm(total=len(queue), unit="job", dynamic_ncols=True, file=sys.stdout)
        try:
            while queue or self.running:
                self._reap()
                started = False if self.failed else self._start_next(queue)
                if self.failed and not self.running:
                    break
                if not started and self.running:
                    time.sleep(0.1)
        finally:
            for one in self.running.values():
                one.process.terminate()
            for one in self.running.values():
                one.process.wait()
                one.reader.join()
            if self.bar is not None:
                self.bar.close()
        if self.failed:
            only_bad_input = set(self.failed.values()) == {2}  # else the work failed: exit status 1
            raise (KdrecipeError if only_bad_input else TrainingError)(
                f"failed: {', '.join(self.failed)} (messages above)",
                remedy="mend the cause and give the same command: finished work is kept",
            )

    def _start_next(self, queue: list[Job]) -> bool:
        waiting = {j.name for j in queue} | set(self.running)
        for job in queue:
            if any(need in waiting for need in job.needs):
                continue
            here = job.alone or self.num_jobs == 1
            if self.running and (here or len(self.running) >= self.num_jobs):
                return False
            queue.remove(job)
            if not self.force and why_run(job, self.plan.jobs) is None:
                # What it needs was made again and came out the same.
                self._say(job, "up to date after all, skipped")
            elif here:
                self._run_here(job)
            else:
                self._spawn(job)
            return True
        return False

    def _say(self, job: Job, text: str) -> None:
        self._print(f"stage {job.stage} {STAGES[job.stage][0]}: {job.name} {text}")
        if self.bar is not None and not text.startswith("..."):
            self.bar.update()

    def _print(self, line: str) -> None:
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def _relay(self, process: subprocess.Popen[str], name: str) -> None:
        """Pass on what a process says; on a terminal its progress is the bar's."""
        assert process.stdout is not None
        for line in process.stdout:
            if self.bar is not None and line.startswith(("step ", "epoch ")):
                self.bar.set_postfix_str(f"{name} {line.rstrip()}")
            else:
                self._print(f"  [{name}] {line.rstrip()}")

    def _run_here(self, job: Job) -> None:
        self._say(job, f"... ({self.reasons[job.name]})")
        seconds = run_job(job, self.plan.jobs)
        self._say(job, f"done in {_duration(seconds)}")

    def _spawn(self, job: Job) -> None:
        self._say(job, f"... ({self.reasons[job.name]})")
        command = [sys.executable, "-m", "kdrecipe.cli", "run", str(self.recipe.path), "--job", job.name]
        command += ["--work", str(self.layout.root)]
        if self.recipe.profile:
            command += ["--profile", self.recipe.profile]
        for override in self.recipe.overrides:
            command += ["--set", override]
        threads = os.environ.get("KDRECIPE_THREADS") or str(max(1, (os.cpu_count() or 1) // self.num_jobs))
        env = {
            **os.environ,
            "KDRECIPE_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "KDRECIPE_PARENT": str(os.getpid()),
        }
        taken = [one.gpu for one in self.running.values()]
        gpu = min(range(max(1, _num_gpus())), key=taken.count)
        if _num_gpus() > 1:
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
        reader = threading.Thread(target=self._relay, args=(process, job.name), daemon=True)
        reader.start()
        self.running[job.name] = _Process(process, reader, gpu)

    def _reap(self) -> None:
        for name, one in list(self.running.items()):
            if one.process.poll() is None:
                continue
            one.reader.join()
            del self.running[name]
            job = self.plan.jobs[name]
            if one.process.returncode:
                self.failed[name] = one.process.returncode
                self._say(job, f"FAILED (exit {one.process.returncode})")
            else:
                self._say(job, f"done in {_duration(time.monotonic() - one.start)}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
