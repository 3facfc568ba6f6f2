"""Errors a person reads: what is wrong, where, what was expected, and what to do.

The command line prints these without a traceback; anything else that escapes is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_SHOWN = 20  # problems printed before the rest is only counted: one screen


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, as the person who caused it needs to see it.

    Args:
        what: the fact, with the offending value.
        where: ``file:line``, a file, an utterance id or a system's name; may be empty.
        remedy: what to do about it; may be empty.
    """

    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


class KdrecipeError(ValueError):
    """A mistake that the user can correct.

    Args:
        problems: all that was found, or the text of a single one.
        where: file and line, or the like, of that single problem.
        remedy: remedy for that single problem.
    """

    def __init__(
        self, problems: str | Problem | Iterable[Problem], *, where: str = "", remedy: str = ""
    ) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, where, remedy)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = list(problems)
        super().__init__(format_problems(self.problems))

    def __reduce__(self) -> tuple[type[KdrecipeError], tuple[list[Problem]]]:
        # Problems, not the rendered text, so that the error survives a process boundary.
        return type(self), (self.problems,)


class RecipeError(KdrecipeError):
    """The recipe's YAML is wrong or asks for what does not exist."""


class DataError(KdrecipeError):
    """A corpus, a manifest, a cached target or an audio file is wrong."""


class PluginError(KdrecipeError):
    """A plugin can't be loaded, or breaks its contract."""


class TrainingError(KdrecipeError):
    """Training can't continue (non-finite loss, out of memory, nothing to learn from)."""


class ParityError(KdrecipeError):
    """An export does not say what its bundle says."""


class MissingExtra(KdrecipeError):
    """An optional package is needed here and not installed.

    Args:
        package: name on PyPI.
        why: what needs it, in a few words.
        install: the command that installs it.
    """

    def __init__(self, package: str, why: str, install: str) -> None:
        super().__init__(f"{why} needs the package {package!r}, which is not installed", remedy=install)
        self._args = (package, why, install)

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return type(self), self._args


def format_problems(problems: Sequence[Problem]) -> str:
    """Render problems for the terminal, at most a screenful."""
    lines = [str(p) for p in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"... and {len(problems) - MAX_SHOWN} more")
    return "\n".join(lines)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Of the ``known`` words the one that ``word`` was most likely meant to be, if any is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for an unknown ``word``: the closest known one, or all of them."""
    known = sorted(set(known))
    close = closest(word, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"known: {', '.join(known)}" if known else "there are none"
