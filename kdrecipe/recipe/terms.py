"""What the terms of an objective are called in logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kdrecipe.interfaces import TargetSpec
from kdrecipe.recipe.sections import Term


def labels_of(terms: Sequence[Term], needs: Sequence[Sequence[TargetSpec]]) -> list[str]:
    """A label for each term: its loss; where a loss occurs twice, with what it learns from.

    Args:
        terms: of a system.
        needs: what each asks of a teacher.

    Returns:
        ``kl``; or ``kl:ctc`` and ``kl:attention``; or ``kl:ctc@big`` and ``kl:ctc@other``. Some may still
        be equal.
    """
    count = Counter(term.name for term in terms)
    labels = [
        f"{term.name}:{need[0].tap}" if count[term.name] > 1 and need else term.name
        for term, need in zip(terms, needs, strict=True)
    ]
    count = Counter(labels)
    return [
        f"{label}@{term.teacher}" if count[label] > 1 and term.teacher else label
        for label, term in zip(labels, terms, strict=True)
    ]
