"""What runs where, how far it is, and until when: written by jobs and runs, read by ``kdrecipe status``.

A job that runs has a file beside its lock, ``.<directory>.status.json``, and rewrites it every few seconds;
one that has not been written for a minute belongs to a job that was killed. A run has ``.run.json`` in the
work directory: the state of all its jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import read_json
from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.elsewhere import here

EVERY_S = 5.0
SILENT_S = 60.0
"""After so long without a word a job counts as killed."""

RUN_FILE = ".run.json"


@dataclass
class Beat:
    """What a running job says of itself.

    Args:
        job: its name.
        where: machine and process.
        since: seconds since 1970, as ``until``.
        done: steps, utterances.
        total: of all; None: not known.
        at_most: whether ``total`` is a bound.
        unit: what is counted.
        facts: more, as in the progress line.
        until: when it ends if it goes on like this; None: not known.
    """

    job: str
    where: str
    since: float
    done: int | None = None
    total: int | None = None
    at_most: bool = False
    unit: str = "step"
    facts: str = ""
    until: float | None = None


_beat: Beat | None = None
_first: tuple[int, float] | None = None  # done and time when this process first told


def status_file(out: Path) -> Path:
    """Of the job that writes ``out``."""
    return out.with_name(f".{out.name}.status.json")


@contextlib.contextmanager
def watched(job: str, out: Path) -> Iterator[None]:
    """Within, the job writes its status; afterwards there is none."""
    global _beat, _first
    _beat, _first = Beat(job, here(), time.time()), None
    ended = threading.Event()
    path = status_file(out)
    writer = threading.Thread(target=_write, args=(path, _beat, ended), daemon=True)
    writer.start()
    try:
        yield
    finally:
        _beat = None
        ended.set()
        writer.join()
        for left in (path, _new(path)):
            left.unlink(missing_ok=True)


def _write(path: Path, beat: Beat, ended: threading.Event) -> None:
    while True:
        # A status is not worth a job: a full disk stops what is worth more, and says so.
        with contextlib.suppress(OSError):
            put(path, asdict(beat))
        if ended.wait(EVERY_S):
            return


def put(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a file of state. What a kill leaves of it is overwritten next time."""
    _new(path).write_text(json.dumps(state, indent=1) + "\n")
    os.replace(_new(path), path)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def tell(done: int, total: int | None, unit: str, at_most: bool, facts: str) -> None:
    """Say how far the job of this process is; nothing if there is none."""
    global _first
    beat = _beat
    if beat is None:
        return
    now = time.time()
    if _first is None or done < _first[0]:
        _first = done, now
    beat.done, beat.total, beat.unit, beat.at_most, beat.facts = done, total, unit, at_most, facts
    if total is not None and done > _first[0]:
        beat.until = now + (now - _first[1]) * (total - done) / (done - _first[0])


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Status:
    """Of a work directory.

    Args:
        run: the newest run's ``.run.json``: where, since, left, jobs (name -> {state, where}); None: none.
        alive: whether that run is still at work.
        beats: of jobs that run.
        killed: of jobs that ended without a word.
    """

    run: Mapping[str, Any] | None
    alive: bool
    beats: list[Beat] = field(default_factory=list)
    killed: list[Beat] = field(default_factory=list)


def read_status(root: Path) -> Status:
    """What is known of ``root``; files that are just being replaced are left out."""
    run, alive = None, False
    with contextlib.suppress(KdrecipeError, OSError):
        run = read_json(root / RUN_FILE)
        alive = not run.get("ended") and _is_new(root / RUN_FILE)
    status = Status(run, alive)
    for path in sorted(root.rglob(".*.status.json")):
        with contextlib.suppress(KdrecipeError, OSError, TypeError):
            beat = Beat(**read_json(path))
            (status.beats if _is_new(path) else status.killed).append(beat)
    return status


def _is_new(path: Path) -> bool:
    return time.time() - path.stat().st_mtime < SILENT_S
