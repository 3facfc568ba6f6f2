"""Whether pretrained bundles fit the recipe, as far as their files show before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdrecipe.recipe.parsing import SECTION_OF, Parser
from kdrecipe.recipe.sections import Features, System, Tokens
from kdrecipe.recipe.suitable import bundle_meta
from kdrecipe.text import read_lines

NUM_SPECIALS = 3  # blank, start and end of the sentence, unknown: the first tokens of every model


def check_features(parser: Parser, systems: Mapping[str, System], features: Features) -> None:
    """A bundle computes on the recipe's features: they must be those that it was trained on."""
    for system in systems.values():
        meta = bundle_meta(system) if system.kind == "pretrained" else None
        its = meta.get("features") if meta else None
        if not isinstance(its, dict):
            continue
        mine = features.model_dump(mode="json", exclude={"speed_perturb"})  # of training alone
        differ = [key for key in mine if key in its and its[key] != mine[key]]
        if differ:
            what = "the bundle was trained on other features than the recipe's: "
            what += ", ".join(f"{key} {its[key]}, not {mine[key]}" for key in differ)
            wanted = ", ".join(f"{key}: {its[key]}" for key in differ)
            remedy = f"set features: {{{wanted}}}, or take a bundle that was trained on the recipe's features"
            parser.problem(("systems", system.name, SECTION_OF[system.kind], "bundle"), what, remedy)


def other_tokens(system: System, tokens: Tokens) -> str | None:
    """Why a pretrained bundle's tokens can't be those that stage 2 will make; None: they may be.

    What stage 2 makes depends on the corpus; the import in stage 3 compares the lists themselves.
    """
    pieces = _pieces(system)
    if pieces is None:
        return None
    if tokens.name == "from_teacher":
        return None if f"<0x{0:02X}>" in pieces else f"{len(pieces)} tokens that are no teacher's"
    if tokens.name == "char":
        if long := next((p for p in pieces[NUM_SPECIALS:] if len(p) > 1), None):
            return f"{len(pieces)} tokens such as {long!r}, the recipe has characters"
        if tokens.vocab_size is not None and len(pieces) > tokens.vocab_size:
            return f"{len(pieces)} tokens, the recipe {tokens.vocab_size} at most"
    elif len(pieces) != tokens.vocab_size:
        return f"{len(pieces)} tokens, the recipe {tokens.vocab_size} ({tokens.name})"
    return None


def _pieces(system: System) -> list[str] | None:
    """The tokens that ``tokens.txt`` of a pretrained bundle lists; None where there is none to read."""
    if bundle_meta(system) is None:
        return None
    try:
        lines = read_lines(Path(str(system.bundle), "tokens.txt"))
    except (OSError, ValueError):
        return None  # stage 3 imports it, and reports what is wrong
    return [line.rpartition(" ")[0] for line in lines]
