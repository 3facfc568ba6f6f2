"""Shallow fusion of a search with a language model (Gulcehre 2015)."""

from __future__ import annotations

from typing import Any

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import LanguageModel


class Fusion:
    """What a text scores besides what the acoustic model says of it.

    Args:
        lm: the language model; None: there is none.
        lm_weight: factor on its natural log-probabilities.
        length_bonus: added per token.
    """

    def __init__(
        self, lm: LanguageModel | None = None, lm_weight: float = 0.0, length_bonus: float = 0.0
    ) -> None:
        self.lm = lm if lm_weight > 0 else None
        self.lm_weight = lm_weight
        self.length_bonus = length_bonus

    @classmethod
    def of(cls, decoder: str, options: Any, lm: LanguageModel | None) -> Fusion:
        """By a decoder's options ``lm_weight`` and ``length_bonus``.

        Raises:
            RecipeError: there is a weight and no language model.
        """
        if options.lm_weight > 0 and lm is None:
            raise RecipeError(
                f"{decoder} has lm_weight {options.lm_weight:g} and no language model",
                remedy="add lm: {name: ngram} to the recipe, or set lm_weight: 0",
            )
        return cls(lm, options.lm_weight, options.length_bonus)

    def __bool__(self) -> bool:
        """Whether it adds anything."""
        return self.lm is not None or self.length_bonus != 0

    def start(self) -> Any:
        """The state before the first token."""
        return None if self.lm is None else self.lm.start()

    def extend(self, state: Any, token: int) -> tuple[float, Any]:
        """What ``token`` adds, and the state after it."""
        if self.lm is None:
            return self.length_bonus, None
        log_prob, after = self.lm.score(state, token)
        return self.lm_weight * log_prob + self.length_bonus, after

    def end(self, state: Any) -> float:
        """What the end of the text adds."""
        return 0.0 if self.lm is None else self.lm_weight * self.lm.end(state)
