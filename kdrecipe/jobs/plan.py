"""Jobs in an order in which they can be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.stamps import Job, why_run


@dataclass
class Plan:
    """Jobs in an order in which each comes after what it needs."""

    jobs: dict[str, Job] = field(default_factory=dict)

    def add(self, job: Job) -> None:
        """Append a job.

        Raises:
            AssertionError: a name is taken, or a need has not been added before.
        """
        assert job.name not in self.jobs, job.name
        assert all(n in self.jobs for n in job.needs), (job.name, job.needs)
        self.jobs[job.name] = job

    def keep_for(self, name: str) -> None:
        """Drop every job but this one and those that it needs, directly or not."""
        kept: set[str] = set()
        waiting = [name]
        while waiting:
            if (job := waiting.pop()) not in kept:
                kept.add(job)
                waiting += self.jobs[job].needs
        self.jobs = {n: job for n, job in self.jobs.items() if n in kept}

    def reasons(self, selected: Sequence[Job], *, force: bool = False) -> dict[str, str]:
        """Why each selected job would run; jobs that are up to date are left out."""
        reasons: dict[str, str] = {}
        for job in selected:
            reason = "forced" if force else why_run(job, self.jobs)
            if reason is None:
                rerun = [n for n in job.needs if n in reasons]
                reason = f"{rerun[0]} will run" if rerun else None
            if reason is not None:
                reasons[job.name] = reason
        return reasons

    def check_available(self, selected: Sequence[Job]) -> None:
        """Refuse to run stages whose inputs are neither finished nor about to be made.

        Raises:
            KdrecipeError: naming the first stage to run, for every such input and what it needs.
        """
        chosen = {job.name for job in selected}
        missing: dict[str, str] = {}
        waiting = list(selected)
        while waiting:
            for need in waiting.pop().needs:
                if need in chosen or need in missing:
                    continue
                if reason := why_run(self.jobs[need], self.jobs):
                    missing[need] = reason
                    waiting.append(self.jobs[need])  # what it needs itself may be missing, too
        if missing:
            stage = min(self.jobs[n].stage for n in missing)
            first = sorted(missing, key=lambda name: self.jobs[name].stage)[:5]
            listed = "; ".join(f"{name} ({missing[name]})" for name in first)
            raise KdrecipeError(
                f"stage {selected[0].stage} reads what earlier stages have not finished: {listed}",
                remedy=f"start with --stage {stage}",
            )
