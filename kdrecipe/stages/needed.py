"""What a recipe needs that this machine lacks: known before any work."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kdrecipe.errors import MissingExtra, Problem, RecipeError
from kdrecipe.recipe.imported import teacher_options
from kdrecipe.recipe.sections import uses_lm

if TYPE_CHECKING:
    from kdrecipe.recipe.load import Recipe


def missing(recipe: Recipe) -> list[Problem]:
    """What is not there: environment variables, corpora, lists, bundles, packages."""
    lists = recipe.corpus.lists
    text = recipe.lm.text if recipe.lm else None
    problems = []
    for location in (recipe.corpus.location, *lists.values(), text):
        try:
            if location is not None:
                location.path()
        except RecipeError as error:
            problems += error.problems
    for system in recipe.systems.values():
        try:
            if system.is_imported:
                teacher_options(recipe.plugins.registry, system)  # what is not there, its check has told
            elif (path := system.bundle) is not None and not (path / "bundle.json").is_file():
                where = system.location.where if system.location else ""
                problems.append(Problem(f"there is no bundle {path}", where))
        except RecipeError as error:
            problems += error.problems
    try:
        root = recipe.corpus.root
        if root is not None and not root.is_dir():
            where = recipe.corpus.location.where if recipe.corpus.location else ""
            problems.append(Problem(f"there is no directory {root}", where))
        for name, location in lists.items():
            if not (path := recipe.corpus.list_path(name)).exists():
                what = f"there is no {path} to list the subset {name!r}"
                problems.append(Problem(what, location.where))
    except RecipeError:  # an environment variable: already reported
        pass
    if kenlm := missing_kenlm(recipe):
        problems += kenlm.problems
    return list(dict.fromkeys(problems))


def missing_kenlm(recipe: Recipe) -> MissingExtra | None:
    """What to report if some search uses the language model and KenLM is not installed."""
    from kdrecipe.data.ngram import INSTALL_KENLM

    users = [label for label, decoder in recipe.decode.decoders.items() if uses_lm(decoder.options)]
    if not users or find_spec("kenlm") is not None:
        return None
    where = recipe.document.where(("decode", "decoders", users[0], "lm_weight"))
    return MissingExtra("kenlm", f"{where}: decode.decoders.{users[0]}", INSTALL_KENLM)
