"""The kinds of targets: how each is computed, stored, put together and brought to a student's frames.

A kind is one file here, and a line of :data:`KINDS`. Which of them go by frames, follow a text or count in
tokens is part of the interface: :data:`kdrecipe.interfaces.FRAME_KINDS` and its like.

B utterances, T frames (or tokens, of targets that go by tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.interfaces import Batch, ModelOutput, TargetKind, TargetSpec
from kdrecipe.targets.kinds.codebooks import Codebooks
from kdrecipe.targets.kinds.hidden import HiddenStates, TokenHiddenStates
from kdrecipe.targets.kinds.hypotheses import Hypotheses
from kdrecipe.targets.kinds.lattice import Lattices
from kdrecipe.targets.kinds.posteriors import FramePosteriors, TokenPosteriors
from kdrecipe.targets.kinds.weights import FrameWeights

Arrays = Mapping[str, np.ndarray]
"""One utterance's target by part: ``log_probs``, ``indices``, ``log_tail``; or ``values``; frames first."""


class Kind(Protocol):
    """A codec; ``item`` is what :class:`kdrecipe.interfaces.Targets` holds of this kind."""

    def of_model(self, out: ModelOutput, batch: Batch, spec: TargetSpec) -> Any:
        """The item of a model of kdrecipe's own, exact."""

    def rounded(self, item: Any, spec: TargetSpec) -> Any:
        """The item as a cache gives it back: the top k alone, rounded to the type stored, padding 0."""

    def parts(self, item: Any, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
        """What is stored of one utterance of a rounded item."""

    def collated(self, rows: Sequence[Arrays]) -> Any:
        """An item of what was stored of its utterances."""

    def between(self, part: str, before: np.ndarray) -> np.ndarray | float:
        """A frame between utterances that were joined, or in the silence around them.

        Args:
            part: of the utterance's arrays.
            before: its last frame, or that of the first utterance's first where nothing is before.
        """

    def weighted(self, item: Any, weights: FrameWeights) -> Any:
        """The item at other frames, each a weighted mean of its own; DataError if that has no meaning."""


KINDS: Mapping[TargetKind, Kind] = {
    "frame_logits": FramePosteriors(),
    "token_logits": TokenPosteriors(),
    "rnnt_lattice": Lattices(),
    "hidden": HiddenStates(),
    "hypotheses": Hypotheses(),
    "token_hidden": TokenHiddenStates(),
    "codebooks": Codebooks(),
}


def kind_of(spec: TargetSpec) -> Kind:
    """The codec of a target; DataError for a kind that has none."""
    if spec.kind not in KINDS:
        raise DataError(
            f"targets of kind {spec.kind!r} can't be computed", remedy=f"use {' or '.join(KINDS)}"
        )
    return KINDS[spec.kind]


def num_frames(arrays: Arrays) -> int:
    """Frames (or tokens) of what was stored of one utterance."""
    return len(next(iter(arrays.values())))


def lens_of(item: Any) -> Tensor:
    """int64 (B,): valid frames (or tokens) of an item."""
    lens_B: Tensor = item.lens_B
    return lens_B
