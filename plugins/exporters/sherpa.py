"""What runs exports in sherpa-onnx: its slots' common demands, and a loaded recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdrecipe.corpus.audio import recognise_long
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import BundleLike, Hypothesis

from .shared import WORD_START

FRAME_SHIFT_S = 0.04  # fixed in sherpa-onnx for these slots
SUBSAMPLING = 4


def check_frame_shift(bundle: BundleLike, exporter: str) -> None:
    """KdrecipeError unless the model's frames are those that sherpa-onnx takes for granted."""
    frame_shift_s = bundle.meta["frame_shift_s"]
    if abs(frame_shift_s - FRAME_SHIFT_S) > 1e-6:
        others = " or the exporter torchscript" if exporter == "onnx_ctc" else ""
        raise KdrecipeError(
            f"the model gives a frame every {frame_shift_s} s, sherpa-onnx assumes {FRAME_SHIFT_S} s of "
            "every model in this slot: all its times would be wrong",
            where=bundle.name,
            remedy=f"use an architecture that subsamples by {SUBSAMPLING}{others}",
        )


def recognise(
    recogniser: Any, ids: dict[str, int], samples_S: np.ndarray, sample_rate: int, longest_s: float
) -> Hypothesis:
    """Audio of any length by an ``OfflineRecognizer``, which resamples if it must."""

    def recognise_one(part_S: np.ndarray, sample_rate: int) -> Hypothesis:
        stream = recogniser.create_stream()
        stream.accept_waveform(sample_rate, np.ascontiguousarray(part_S, dtype=np.float32))
        recogniser.decode_stream(stream)
        found = stream.result
        return Hypothesis(found.text.strip(), [ids[token] for token in found.tokens], list(found.timestamps))

    return recognise_long(recognise_one, [samples_S], sample_rate, longest_s)


def ids_by_name(pieces: Sequence[str]) -> dict[str, int]:
    """Token ids by name; sherpa-onnx shows the word-start mark of SentencePiece as a space."""
    ids = {}
    for number, piece in enumerate(pieces):
        ids[piece] = ids[piece.replace(WORD_START, " ")] = number
    return ids
