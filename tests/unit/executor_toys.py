"""A plan of jobs that write a file each, for the tests of executors; also run as a script: its jobs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kdrecipe.jobs import stamps
from kdrecipe.jobs.executors import PARENT, die_with_parent
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job, run_job, why_run


def toy_plan(root: Path, victim: str = "") -> Plan:
    """Three jobs side by side and one that reads them.

    Args:
        root: work directory; ``root/ran`` gets a line for each beginning and each end.
        victim: once, the second job ends this: ``worker``, the process that started it, or ``itself``.
    """
    plan = Plan()

    def work(name: str, needs: tuple[str, ...]) -> None:
        def run(out: Path) -> None:
            note(root, f"begin {name}")
            if name == "two" and victim and not (root / "killed").exists():
                (root / "killed").touch()
                os.kill(int(os.environ[PARENT]) if victim == "worker" else os.getpid(), signal.SIGKILL)
                signal.pause()  # until it ends with its worker
            read = "".join((root / need / "text").read_text() for need in needs)
            (out / "text").write_text(f"{name} {read}")
            note(root, f"end {name}")

        plan.add(Job(5, name, root / name, {"name": name}, run, needs, alone=False))

    for name in ("one", "two", "three"):
        work(name, ())
    work("all", ("one", "two", "three"))
    return plan


def note(root: Path, line: str) -> None:
    with open(root / "ran", "a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    stamps.core_hash = lambda: "toy"  # it reads all of the core
    die_with_parent()
    place, wanted, killed = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    jobs = toy_plan(place, killed).jobs
    print(f"begins {wanted}", flush=True)
    if why_run(jobs[wanted], jobs) is not None:
        run_job(jobs[wanted], jobs)
