"""Word and token errors: the fewest edits from reference to hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass
class Edits:
    """Word or token errors, summed.

    Args:
        substitutions: items that are replaced by another.
        deletions: items of the reference that are missing.
        insertions: items that the reference does not have.
        length: number of items of the reference.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0

    def add(self, reference: Sequence[Item], hypothesis: Sequence[Item]) -> None:
        """Count one utterance."""
        found = edits(reference, hypothesis)
        self.substitutions += found.substitutions
        self.deletions += found.deletions
        self.insertions += found.insertions
        self.length += found.length

    @property
    def errors(self) -> int:
        """All three kinds together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per item of the reference; 0 or more, it may exceed 1."""
        return self.errors / max(1, self.length)


def edits(reference: Sequence[Item], hypothesis: Sequence[Item]) -> Edits:
    """The fewest edits from reference to hypothesis; among equals, those with the fewest deletions."""
    # per prefix of the hypothesis: (errors, deletions, insertions, substitutions)
    row = [(j, 0, j, 0) for j in range(len(hypothesis) + 1)]
    for i, expected in enumerate(reference, 1):
        previous, row = row, [(i, i, 0, 0)]
        for j, found in enumerate(hypothesis, 1):
            errors, deletions, insertions, substitutions = previous[j - 1]
            if expected == found:
                row.append(previous[j - 1])
                continue
            row.append(
                min(
                    (errors + 1, deletions, insertions, substitutions + 1),
                    (previous[j][0] + 1, previous[j][1] + 1, *previous[j][2:]),
                    (row[-1][0] + 1, row[-1][1], row[-1][2] + 1, row[-1][3]),
                )
            )
    _, deletions, insertions, substitutions = row[-1]
    return Edits(substitutions, deletions, insertions, len(reference))
