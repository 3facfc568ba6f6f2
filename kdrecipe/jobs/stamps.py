"""Jobs and their stamps: what is finished, what is stale, and how one job is run.

A *job* writes one directory (a corpus's manifests, one system's bundle for one seed, ...). Its
*stamp*, written last and atomically, records the inputs that determine the output. A job is
skipped while its stamp agrees with the recipe, with the content of what it was made from, and
with the files on disk; a killed job has no stamp and is rerun, or resumed if it can.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import (
    content_digest,
    disk_errors,
    fingerprint,
    list_result,
    read_json,
    same_folder,
    state_digest,
    write_json,
)
from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.watch import watched
from kdrecipe.plugin.source_code import core_hash


@dataclass(frozen=True)
class Job:
    """One directory to be written.

    Args:
        stage: its number; the plan's order follows it.
        name: unique, ``<verb>`` or ``<verb>/<system>/seed<k>``.
        out: the directory it writes.
        inputs: everything in the recipe that determines the output, JSON-like.
        needs: names of the jobs whose output it reads.
        run: does the work, given the directory to write into.
        resumable: may resume in the directory that an interrupted run of the same inputs left.
        in_place: writes directly into ``out``, which is too big to be on the disk twice.
        sources: given the finished directory, files elsewhere that it was made from and that are not
            among ``inputs``, since only the work itself finds them; they count by size and time.
        alone: runs with nothing beside it, since it measures time or memory, or uses all cores.
        together: trains; where several processes train one model, all of them run it.
    """

    stage: int
    name: str
    out: Path
    inputs: Mapping[str, Any]
    run: Callable[[Path], None]
    needs: tuple[str, ...] = ()
    resumable: bool = False
    in_place: bool = False
    sources: Callable[[Path], Iterable[Path]] | None = None
    alone: bool = True
    together: bool = False

    @property
    def stamp(self) -> Path:
        """The file that says the output is complete."""
        return self.out / "stamp.json"


def why_run(job: Job, jobs: Mapping[str, Job]) -> str | None:
    """Why the job's output is missing or stale, or None if it is up to date."""
    if not job.stamp.exists():
        return "interrupted before, resumes" if _resumable(job, jobs) else "no finished output"
    stamp = _read_stamp(job)
    if stamp is None:
        return "its stamp is damaged"
    if stamp["inputs"] != _plain(job.inputs):
        return "changed: " + describe_change(stamp["inputs"], _plain(job.inputs))
    if other := set(stamp["needs"]) ^ set(job.needs):
        return f"it now reads other things than before: {', '.join(sorted(other)[:3])}"
    for need in job.needs:
        upstream = _read_stamp(jobs[need])
        if upstream is not None and stamp["needs"].get(need) != upstream["content"]:
            return f"{need} has changed since"
    for name, size in stamp["files"].items():
        try:
            same = os.stat(os.path.join(job.out, name)).st_size == size
        except OSError:
            same = False
        if not same:
            return f"{name} is missing or damaged"
    for name, stated in stamp.get("folders", {}).items():
        if not same_folder(job.out / name, stated):
            return f"files in {name} are missing or damaged"
    if job.sources is not None and stamp.get("sources") != state_digest(job.sources(job.out)):
        return "files that it was made from have changed since"
    return None


def _read_stamp(job: Job) -> dict[str, Any] | None:
    """The stamp, None if it is absent or damaged."""
    try:
        stamp = read_json(job.stamp)
    except KdrecipeError:
        return None
    keys = {"inputs", "needs", "content", "files"}
    return stamp if isinstance(stamp, dict) and keys <= stamp.keys() else None


def seconds_of(job: Job) -> float | None:
    """What the job took when it last ran to its end; None if that is not known."""
    seconds = (_read_stamp(job) or {}).get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=str))


def describe_change(old: Any, new: Any, path: str = "") -> str:
    """The first few differences between two JSON-like values, ``a.b: 1 -> 2``."""
    changes = list(_changes(old, new, path))
    more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more


def _changes(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if before != after:
                yield from _changes(before, after, f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                yield from _changes(a, b, f"{path}[{index}]")
    else:
        yield f"{path} {_short(old)} -> {_short(new)}"


_ABSENT = "absent"  # not None: a new option whose default is null is a change as well


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------- running one job


def working_dir(job: Job) -> Path:
    """Where a job writes until it is finished."""
    return job.out if job.in_place else job.out.with_name(job.out.name + ".partial")


def _resumable(job: Job, jobs: Mapping[str, Job]) -> bool:
    try:
        return job.resumable and read_json(working_dir(job) / "started.json") == _started(job, jobs)
    except KdrecipeError:
        return False


def _started(job: Job, jobs: Mapping[str, Job]) -> dict[str, str]:
    """What an interrupted run started with: its inputs, and the content of what it reads."""
    needs = {name: (_read_stamp(jobs[name]) or {}).get("content") for name in job.needs}
    return {"inputs": fingerprint(_plain(job.inputs)), "needs": fingerprint(needs)}


def run_job(job: Job, jobs: Mapping[str, Job], work: Callable[[Job, Path], None] | None = None) -> float:
    """Run one job to its stamp; returns the seconds it took.

    Args:
        job: the job.
        jobs: all of the plan.
        work: does the job in a directory; None: its own ``run``.

    Raises:
        KdrecipeError: the job failed, or another process is running it.
    """
    start = time.monotonic()
    partial = working_dir(job)
    with locked(job.out.with_name(f".{job.out.name}.lock"), f"job {job.name}"):
        if job.in_place:
            job.stamp.unlink(missing_ok=True)  # what is there is incomplete from here on
        if not _resumable(job, jobs) and partial.exists():
            shutil.rmtree(partial)
        for half_written in partial.rglob(".*.part"):  # by the run that was killed
            half_written.unlink()
        write_json(partial / "started.json", _started(job, jobs))
        needs = {n: read_json(jobs[n].stamp)["content"] for n in job.needs}
        with disk_errors(job.out), watched(job.name, job.out):
            work(job, partial) if work else job.run(partial)
        (partial / "started.json").unlink()
        files, folders = list_result(partial)
        stamp = {
            "job": job.name,
            "inputs": _plain(job.inputs),
            "needs": needs,
            "content": content_digest(partial, files, folders),
            "files": files,
            **({"folders": folders} if folders else {}),
            "sources": state_digest(job.sources(partial)) if job.sources else None,
            "core": core_hash(),
            "seconds": round(time.monotonic() - start, 3),
        }
        write_json(partial / "stamp.json", stamp)
        if not job.in_place:
            _replace_dir(partial, job.out)
    return time.monotonic() - start


def _replace_dir(new: Path, out: Path) -> None:
    """Replace ``out`` by ``new``: a kill in between leaves ``out`` absent, never mixed."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file while working; it is freed by the system even if we are killed.

    Raises:
        KdrecipeError: another process holds it.
    """
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  (closed below)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KdrecipeError(
                f"another process is working on {what}",
                where=str(path.parent),
                remedy="wait for it, stop it, or use another directory with --work DIR",
            ) from None
        yield
