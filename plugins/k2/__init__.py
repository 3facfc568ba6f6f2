"""k2 (https://github.com/k2-fsa/k2), where it is installed: its transducer loss, its graph search.

The plugin loads without it; a recipe that names ``k2_rnnt`` or ``k2_hlg`` then gets an error that
says so before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError, Problem

from .hlg import INSTEAD_OF_HLG, K2Hlg
from .package import import_k2
from .rnnt import INSTEAD_OF_RNNT, K2Rnnt


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``k2_rnnt`` known."""
    register("k2_rnnt", K2Rnnt)


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    """Make ``k2_hlg`` known."""
    register("k2_hlg", K2Hlg)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """k2 must be installed if the recipe names a part of it: one problem, at the first such line."""
    for who, instead, path in _named(recipe):
        try:
            import_k2(who, instead)
        except KdrecipeError as error:
            problem = error.problems[0]
            return [Problem(problem.what, recipe.document.where(path), problem.remedy)]
        return []
    return []


def _named(recipe: Any) -> Iterator[tuple[str, str, tuple[str | int, ...]]]:
    """What the recipe names of this plugin: its name, what to write instead, its key path."""
    for system in recipe.systems.values():
        section = "distill" if system.kind == "distilled" else "train"
        for number, term in enumerate(system.terms):
            if term.name == "k2_rnnt":
                yield term.name, INSTEAD_OF_RNNT, ("systems", system.name, section, "losses", number, "name")
    for label, decoder in recipe.decode.decoders.items():
        if decoder.name == "k2_hlg":
            yield decoder.name, INSTEAD_OF_HLG, ("decode", "decoders", label, "name")
