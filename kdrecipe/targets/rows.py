"""What a teacher said about utterances alone, where they stand in a row with silence around them.

T frames, K kept classes, D width, P positions of a lattice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdrecipe.errors import DataError
from kdrecipe.frames import MIN_LOG_PROB
from kdrecipe.interfaces import BLANK_ID, FORCED_KINDS, Piece, TargetSpec

Arrays = Mapping[str, np.ndarray]
"""One utterance's target by part: ``log_probs``, ``indices``, ``log_tail``; or ``values``."""


def in_row(
    said: Sequence[Arrays], pieces: Sequence[Piece], num_frames: int, spec: TargetSpec, stride: int
) -> Arrays:
    """The target of a row: its utterances' arrays and, for the frames between and around them, silence.

    A teacher is taken to say blank there, with certainty; hidden states are those of the nearest frame
    before, or of the first. Nothing is stretched or cropped.

    Args:
        said: of each utterance.
        pieces: where they are.
        num_frames: feature frames of the row.
        spec: of the target.
        stride: feature frames to a frame of the target.

    Raises:
        DataError: joined targets that depend on a text; an utterance between two frames of the target.
    """
    first, last = pieces[0], pieces[-1]
    if len(pieces) > 1 and spec.kind in FORCED_KINDS:
        raise DataError(
            f"cached targets of kind {spec.kind} follow the text of one utterance, and can't be joined",
            where="+".join(piece.id for piece in pieces),
            remedy="set training.augment.join: 0, or targets.mode: live",
        )
    if spec.kind == "token_logits" or (first.start == 0 and num_frames == last.num_frames):
        return said[0]
    around = num_frames - last.start - last.num_frames
    if any(piece.start % stride for piece in pieces) or around % stride:
        raise DataError(
            f"an utterance begins or ends within a frame of {spec.key}",
            where="+".join(piece.id for piece in pieces),
            remedy="silence around an utterance must be whole frames of the target",
        )
    starts = [piece.start // stride for piece in pieces]
    lens = [len(next(iter(arrays.values()))) for arrays in said]
    length = starts[-1] + lens[-1] + around // stride
    row: dict[str, np.ndarray] = {}
    for part, values in said[0].items():
        row[part] = np.empty((length, *values.shape[1:]), values.dtype)
        row[part][:] = values[:1] if spec.kind == "hidden" else _silence(part, values, spec)
        for start, size, arrays in zip(starts, lens, said, strict=True):
            row[part][start : start + size] = arrays[part]
            if spec.kind == "hidden" and size:
                row[part][start + size :] = arrays[part][-1]
    return row


def _silence(part: str, values: np.ndarray, spec: TargetSpec) -> np.ndarray | float:
    """One frame in which blank is certain."""
    if spec.kind == "rnnt_lattice":
        return np.array([MIN_LOG_PROB, 0.0], values.dtype)  # the next token, blank
    if part == "log_tail":
        return MIN_LOG_PROB
    classes = np.arange(values.shape[1])
    if part == "indices":
        return classes  # blank and whatever comes next, each once
    return np.where(classes == BLANK_ID, 0.0, MIN_LOG_PROB).astype(values.dtype)
