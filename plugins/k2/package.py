"""The package ``k2``, imported only where it is used: it has to be built for the torch that runs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from kdrecipe.errors import KdrecipeError, MissingExtra

INSTALL = "install k2 for your torch from https://k2-fsa.github.io/k2"


def import_k2(who: str, instead: str) -> Any:
    """The module ``k2``.

    Args:
        who: what needs it, as the recipe writes it.
        instead: what to write instead of it.

    Raises:
        MissingExtra: it is not installed.
        KdrecipeError: it is installed and can't be imported: as a rule, since it was built for
            another torch.
    """
    remedy = f"{INSTALL}, or use {instead}"
    if importlib.util.find_spec("k2") is None:
        raise MissingExtra("k2", who, remedy)
    try:
        return importlib.import_module("k2")
    except Exception as error:  # it links to torch's libraries: anything may come of another version's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise KdrecipeError(f"{who} needs k2, which can't be imported: {reason}", remedy=remedy) from None
