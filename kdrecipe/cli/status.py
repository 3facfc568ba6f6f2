"""``kdrecipe status``: what of a run is where, how far, how fast, until when."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from kdrecipe.errors import KdrecipeError
from kdrecipe.jobs.watch import Beat, Status, read_status

_SHOWN = 5


def status(work: Path) -> None:
    """Print the state of a work directory.

    Raises:
        KdrecipeError: no run has been there.
    """
    found = read_status(work)
    if found.run is None and not found.beats and not found.killed:
        raise KdrecipeError(
            "no run has left its state here",
            where=str(work),
            remedy="name a recipe's work directory: RECIPE/exp, or what --work says",
        )
    for line in _lines(found):
        click.echo(line)


def _lines(found: Status) -> Iterator[str]:
    states = {} if found.run is None else {name: job["state"] for name, job in found.run["jobs"].items()}
    run = found.run
    if run is not None:
        counts = Counter(states.values())
        done = counts["done"] + counts["up to date"]
        now = "ended" if run["ended"] else "runs" if found.alive else "was killed; its command resumes it"
        of = run["left"] if found.alive and run["left"] else f"{done} of {len(states)} jobs done"
        yield f"run of {_clock(run['since'])} on {run['where']} {now}: {of}"
    shown = {beat.job for beat in found.beats}
    for beat in found.beats:
        yield f"  running  {beat.job:28s} {beat.where}{_progress(beat)}"
    for name, job in run["jobs"].items() if run is not None and found.alive else ():
        if job["state"] == "running" and name not in shown:
            yield f"  queued   {name:28s} {job['where']}"
    for beat in found.killed:
        yield f"  killed   {beat.job:28s} {beat.where}{_progress(beat, over=True)}"
    for state in ("failed", "waiting"):
        names = [name for name, its in states.items() if its == state]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"  {state:8s} {', '.join(names[:_SHOWN])}{more}"


def _progress(beat: Beat, over: bool = False) -> str:
    if beat.done is None:
        return f", since {_clock(beat.since)}"
    of = f" of {'at most ' if beat.at_most else ''}{beat.total}" if beat.total is not None else ""
    until = f", until {'at most' if beat.at_most else 'about'} {_clock(beat.until)}" if beat.until else ""
    facts = f", {beat.facts}" if beat.facts else ""
    return f", {beat.unit} {beat.done}{of}{'' if over else until}{facts}"


def _clock(moment: float) -> str:
    """``14:05``, with the date if it is another day's."""
    there = time.localtime(moment)
    same = there[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same else "%Y-%m-%d %H:%M", there)
