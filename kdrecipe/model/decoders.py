"""The search that a recipe or a user names, built for a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Decoder, LanguageModel
from kdrecipe.recipe.sections import Named, uses_lm

if TYPE_CHECKING:
    from kdrecipe.model.bundle import Bundle


def build_decoder(bundle: Bundle, named: Named, lm: LanguageModel | None = None) -> Decoder:
    """The decoder that ``named`` describes, for the tokens and frames of ``bundle``.

    Args:
        bundle: what it is to search.
        named: the decoder and its options.
        lm: over the bundle's tokens; given to decoders whose ``lm_weight`` is above 0.

    Raises:
        KdrecipeError: there is no such decoder, or the model lacks its head.
    """
    registry, heads = bundle.registry, list(bundle.meta["model"]["heads"])
    cls = registry.get("decoders", named.name)
    if cls.head not in heads:
        fitting = [
            name for name in registry.names("decoders") if registry.get("decoders", name).head in heads
        ]
        raise KdrecipeError(
            f"{named.name!r} searches the head {cls.head!r}, the model has {', '.join(heads)}",
            where=str(bundle.path),
            remedy=f"give one of {', '.join(fitting)}",
        )
    config = cls.Config.model_validate(named.options)
    more = (lm if uses_lm(named.options) else None,) if "lm_weight" in cls.Config.model_fields else ()
    decoder: Decoder = cls(config, bundle.tokens, bundle.head_shift_s(cls.head), *more)
    return decoder
