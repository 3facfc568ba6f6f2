"""What a teacher said about utterances alone, where they stand in a row with silence around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdrecipe.errors import DataError
from kdrecipe.interfaces import FORCED_KINDS, Piece, TargetSpec
from kdrecipe.targets.kinds import Arrays, kind_of, num_frames


def in_row(
    said: Sequence[Arrays], pieces: Sequence[Piece], num_features: int, spec: TargetSpec, stride: int
) -> Arrays:
    """The target of a row: its utterances' arrays and, for the frames between and around them, silence.

    A teacher is taken to say blank there, with certainty; hidden states are those of the nearest frame
    before, or of the first. Nothing is stretched or cropped.

    Args:
        said: of each utterance.
        pieces: where they are.
        num_features: feature frames of the row.
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
    if spec.kind in ("token_logits", "token_hidden") or (
        first.start == 0 and num_features == last.num_frames
    ):
        return said[0]
    around = num_features - last.start - last.num_frames
    if any(piece.start % stride for piece in pieces) or around % stride:
        raise DataError(
            f"an utterance begins or ends within a frame of {spec.key}",
            where="+".join(piece.id for piece in pieces),
            remedy="silence around an utterance must be whole frames of the target",
        )
    starts = [piece.start // stride for piece in pieces]
    lens = [num_frames(arrays) for arrays in said]
    length = starts[-1] + lens[-1] + around // stride
    kind, row = kind_of(spec), {}
    for part, values in said[0].items():
        row[part] = np.empty((length, *values.shape[1:]), values.dtype)
        row[part][:] = kind.between(part, values[0] if len(values) else np.zeros_like(row[part][0]))
        for start, size, arrays in zip(starts, lens, said, strict=True):
            row[part][start : start + size] = arrays[part]
            if size:
                row[part][start + size :] = kind.between(part, arrays[part][-1])
    return row
