"""``trials`` of a system: the same system with other options, among which the dev split chooses.

::

    kl:
      distill: {teachers: [teacher], model: *small, losses: [{name: ctc}, {name: kl, weight: 0.5}]}
      trials: [{losses.kl.weight: 1.0}, {losses.kl.temperature: 2.0, training.epochs: 60}]

Written out (:func:`written_out`), each is a system of its own, checked, trained and resumed as any other.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdrecipe.errors import Problem, RecipeError, did_you_mean
from kdrecipe.recipe.parsing import TRIALS
from kdrecipe.recipe.sections import System
from kdrecipe.recipe.validation import dotted, short
from kdrecipe.recipe.yaml import Document, KeyPath

OPTION = "--trials"
SPLIT = "dev"
KINDS = ("train", "distill")
CHANGEABLE = ("losses", "training", "targets", "ema")
"""Sections of a system that a trial may change. Model, data, teachers and seeds are what it holds still: they
make another system, with a row of its own."""
EXAMPLE = "write trials: [{losses.kl.weight: 1.0}, {losses.kl.temperature: 2.0}]"


@dataclass(frozen=True)
class Trial:
    """Other options of a system.

    Args:
        of: the system.
        name: of the system that it is, written out.
        options: what differs, as the recipe writes it: dotted key -> value.
        where: its file and line.
    """

    of: str
    name: str
    options: Mapping[str, Any]
    where: str


def written_out(document: Document) -> tuple[Document, tuple[Trial, ...], list[Problem]]:
    """A recipe's document with a system for each trial, one seed for all, and dev as what is recognised.

    Returns:
        The document; the trials; what is wrong with them, apart from what systems are checked for.
    """
    result = document.copy()
    trials: list[Trial] = []
    problems: list[Problem] = []
    systems = document.data.get("systems")
    for name, written in systems.items() if isinstance(systems, dict) else ():
        if not isinstance(written, dict) or TRIALS not in written:
            continue
        path: KeyPath = ("systems", name, TRIALS)
        kinds = [kind for kind in KINDS if isinstance(written.get(kind), dict)]
        found, wrong = _trials_of(document, path, written[TRIALS], kinds)
        problems += wrong
        for trial in found:
            result, wrong = _with_system(result, trial, kinds[0])
            problems += wrong
        trials += found
    _one_seed(result)
    if isinstance(result.data.get("decode", {}), dict | None):
        result.set(("decode", "splits"), [SPLIT], OPTION)
    result.data.pop("claims", None)  # of splits that are not recognised
    return result, tuple(trials), problems


def _trials_of(
    document: Document, path: KeyPath, written: Any, kinds: Sequence[str]
) -> tuple[list[Trial], list[Problem]]:
    where = document.where(path)
    if len(kinds) != 1:
        problem = Problem(f"{dotted(path)}: only systems with train or distill have trials", where)
        return [], [problem]
    if not isinstance(written, list) or not written:
        return [], [Problem(f"{dotted(path)}: is {short(written)}, it must be a list", where, EXAMPLE)]
    trials: list[Trial] = []
    problems: list[Problem] = []
    for i, options in enumerate(written):
        here, line = dotted((*path, i)), document.where((*path, i))
        if not isinstance(options, dict) or not options:
            what = f"{here}: is {short(options)}, it must be a mapping of dotted keys"
            problems.append(Problem(what, line, EXAMPLE))
            continue
        problems += [
            Problem(f"{here}.{key}: a trial can't change {key.split('.')[0]!r}", line, _may_change(key))
            for key in options
            if key.split(".")[0] not in CHANGEABLE
        ]
        trials.append(Trial(str(path[1]), f"{path[1]}-trial{i + 1}", options, line))
    return ([] if problems else trials), problems


def _may_change(key: str) -> str:
    known = ", ".join(CHANGEABLE)
    close = did_you_mean(key.split(".")[0], CHANGEABLE)
    return f"it may change {known}" + (f"; {close}" if close.startswith("did") else "")


def _with_system(document: Document, trial: Trial, kind: str) -> tuple[Document, list[Problem]]:
    """The document with the trial written out behind its system."""
    if trial.name in document.data["systems"]:
        what = f"the trial's own name {trial.name!r} is that of a system"
        return document, [Problem(what, document.where(("systems", trial.name)), "rename the system")]
    place: KeyPath = ("systems", trial.name)
    document.set(place, {}, trial.where)
    document = document.copied(("systems", trial.of, kind), (*place, kind))
    problems = []
    for key, value in trial.options.items():
        try:
            path = document.path_of((*map(str, place), kind, *key.split(".")))
            document.set(path, copy.deepcopy(value), trial.where)
        except RecipeError as error:
            problems += [Problem(f"{key}: {p.what}", p.where, p.remedy) for p in error.problems]
    return document, problems


def _one_seed(document: Document) -> None:
    """The first seed of everything."""
    places: list[KeyPath] = [("seeds",)]
    systems = document.data.get("systems")
    for name, written in systems.items() if isinstance(systems, dict) else ():
        places += [
            ("systems", name, kind, "seeds") for kind in (written if isinstance(written, dict) else ())
        ]
    for place in places:
        if isinstance(seeds := document.at(place), list):
            document.set(place, seeds[:1], document.where(place))


def without_effect(trials: Sequence[Trial], systems: Mapping[str, System]) -> Iterator[Problem]:
    """Trials that are the system itself, or another trial of it."""
    for number, trial in enumerate(trials):
        others = [trial.of, *(other.name for other in trials[:number] if other.of == trial.of)]
        mine = systems.get(trial.name)
        for other in others if mine is not None else ():
            theirs = systems.get(other)
            if theirs is not None and replace(theirs, name=trial.name) == mine:
                what = "these options are the system's own" if other == trial.of else f"the same as {other}"
                yield Problem(f"systems.{trial.of}.trials: {what}", trial.where, "leave it out")


def unequal(trials: Sequence[Trial], systems: Mapping[str, System]) -> str | None:
    """A sentence if systems that have trials have different numbers of them; None: all have the same."""
    count = Counter(trial.of for trial in trials)
    numbers = {name: count[name] for name in systems if count[name]}
    if len(set(numbers.values())) < 2:
        return None
    listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return f"systems have different numbers of trials, which favours those with more: {listed}"
