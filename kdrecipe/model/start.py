"""Starting from the weights of another model: of all of it, or of chosen layers (``init_from``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdrecipe.errors import RecipeError
from kdrecipe.recipe.starting import Parts

if TYPE_CHECKING:
    from kdrecipe.interfaces import Teacher
    from kdrecipe.model.asr import AsrModel
    from kdrecipe.model.bundle import Bundle

INPUT_MAP = "input_map."
"""What the names begin with of the weights that an encoder's ``fit_input`` makes."""


@dataclass(frozen=True)
class Lender:
    """A model whose weights another one starts with.

    Args:
        model: its description, as in a recipe.
        state: its weights.
        pieces: its tokens.
    """

    model: Mapping[str, Any]
    state: Mapping[str, Tensor]
    pieces: Sequence[str]

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Lender:
        """A bundle's model."""
        return cls(bundle.meta["model"], bundle.model.state_dict(), bundle.tokens.pieces)

    @classmethod
    def of_teacher(cls, teacher: Teacher) -> Lender:
        """An imported teacher as a model of kdrecipe's.

        Raises:
            RecipeError: it is none: its plugin has no ``as_model``.
        """
        if not hasattr(teacher, "as_model"):
            raise RecipeError(
                f"{type(teacher).__name__} can't lend its weights: no model of kdrecipe's is like it",
                remedy="learn from it: a loss on its hidden states, posteriors or hypotheses",
            )
        return cls(*teacher.as_model())


def start_from(model: AsrModel, lender: Lender, parts: Parts, pieces: Sequence[str]) -> bool:
    """Take over the weights of ``parts``.

    A head over other tokens is left as it is, unless its layers were chosen: then what goes by tokens is
    taken over where both have a piece of that name.

    Args:
        model: what is to be trained; changed in place.
        lender: of the weights.
        parts: of :func:`kdrecipe.recipe.starting.shared_parts`.
        pieces: tokens of ``model``.

    Returns:
        Whether the input's map is still to be fitted, since the lender knows other features.

    Raises:
        RecipeError: weights are missing, or have other shapes.
    """
    same_tokens = list(pieces) == list(lender.pieces)
    to_fit = False
    for part, numbers in parts.items():
        module: Any = model.get_submodule(part)
        found = {k[len(part) + 1 :]: v for k, v in lender.state.items() if k.startswith(f"{part}.")}
        if numbers is not None:
            found = _chosen(found, module.layer_list, numbers)
        if part.startswith("heads.") and not same_tokens:
            if numbers is None:
                continue
            found |= _rows(module, found, _places(lender.pieces, pieces))
        if part == "norm" and not found:
            continue  # it has features of its own: the model's are those of the recipe
        mine = module.state_dict()
        missing = sorted(set(mine) - set(found))
        if hasattr(module, "fit_input") and all(k.startswith(INPUT_MAP) for k in missing):
            to_fit, missing = bool(missing), []
        wrong = [k for k in mine if k in found and mine[k].shape != found[k].shape]
        if missing or wrong or set(found) - set(mine):
            raise RecipeError(_misfit(part, missing, wrong or sorted(set(found) - set(mine)), mine, found))
        module.load_state_dict({**mine, **found})
    return to_fit


def _chosen(state: Mapping[str, Tensor], layer_list: str, numbers: Sequence[int]) -> dict[str, Tensor]:
    """``state`` with the layers of these numbers only, renumbered in their order."""
    prefix = f"{layer_list}."
    kept = {k: v for k, v in state.items() if not k.startswith(prefix)}
    for new, old in enumerate(numbers):
        own = f"{prefix}{old}."
        kept |= {f"{prefix}{new}.{k[len(own) :]}": v for k, v in state.items() if k.startswith(own)}
    return kept


def _places(theirs: Sequence[str], mine: Sequence[str]) -> list[tuple[int, int]]:
    """(number here, number there) of the tokens that both have."""
    there = {piece: number for number, piece in enumerate(theirs)}
    return [(number, there[piece]) for number, piece in enumerate(mine) if piece in there]


def _rows(module: Any, found: Mapping[str, Tensor], places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What of a head has a row per token: the model's own rows, with those of common tokens put in place."""
    own, result = module.state_dict(), {}
    for name in getattr(module, "token_rows", ()):
        if name in own and name in found:
            result[name] = own[name].clone()
            if places:
                here, there = map(list, zip(*places, strict=True))
                result[name][here] = found[name][there].to(own[name])
    return result


def _misfit(
    part: str,
    missing: Sequence[str],
    wrong: Sequence[str],
    mine: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> str:
    name = (*wrong, *missing)[0]
    here, there = (str(tuple(s[name].shape)) if name in s else "none" for s in (mine, found))
    return f"init_from: the weights do not fit {part}: {name} is {here} here, {there} there"
