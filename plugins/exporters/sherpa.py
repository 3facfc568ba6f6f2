"""What runs exports in sherpa-onnx: its slots' common demands, and a loaded recogniser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.artifacts import write_atomic
from kdrecipe.corpus.audio import recognise_long
from kdrecipe.data.tokens import read_pieces
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SOS_EOS_ID, BundleLike, Hypothesis, Speller
from kdrecipe.text import WORD_START

from .runtimes import names_of

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
    recogniser: Any,
    ids: dict[str, int],
    samples_S: np.ndarray,
    sample_rate: int,
    longest_s: float,
    *,
    likely: Callable[[np.ndarray, int], list[int]] | None = None,
) -> Hypothesis:
    """Audio of any length by an ``OfflineRecognizer``, which resamples if it must.

    Args:
        recogniser: of sherpa-onnx.
        ids: token ids by the names in its results.
        samples_S: audio.
        sample_rate: of it.
        longest_s: what is longer is recognised in pieces.
        likely: tokens of a piece, asked for where those that were said have no names (see
            :func:`.runtimes.names_of`).
    """

    def recognise_one(part_S: np.ndarray, sample_rate: int) -> Hypothesis:
        stream = recogniser.create_stream()
        stream.accept_waveform(sample_rate, np.ascontiguousarray(part_S, dtype=np.float32))
        recogniser.decode_stream(stream)
        found = stream.result
        names, are_its_own = names_of(found)
        tokens = (
            [ids[name] for name in names] if are_its_own or likely is None else likely(part_S, sample_rate)
        )
        return Hypothesis(found.text.strip(), tokens, list(found.timestamps))

    return recognise_long(recognise_one, [samples_S], sample_rate, longest_s)


# ---------------------------------------------------------------- texts

DROPPED = ("SIL", "</s>")  # tokens that sherpa-onnx leaves out of what CTC says, whatever they mean

_CJK = (
    (0x1100, 0x11FF), (0x2E80, 0xA4CF), (0xA840, 0xD7AF), (0xF900, 0xFAFF), (0xFE30, 0xFE4F),
    (0xFF65, 0xFFDC), (0x20000, 0x2FFFF),
)  # fmt: skip
_PUNCTUATION = (
    (0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x3000, 0x303F), (0xFF01, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65),
)  # fmt: skip


def ctc_speller(pieces: Sequence[str]) -> Speller:
    """What sherpa-onnx writes for tokens of CTC: all but :data:`DROPPED`."""
    names = [b"" if piece in DROPPED else name for piece, name in zip(pieces, _names(pieces), strict=True)]
    return lambda ids: b"".join(names[i] for i in ids).decode("utf-8", "ignore")


def plain_speller(pieces: Sequence[str]) -> Speller:
    """What sherpa-onnx writes for tokens of encoder-decoders: their names in a row."""
    names = _names(pieces)
    return lambda ids: b"".join(names[i] for i in ids).decode("utf-8", "ignore")


def transducer_speller(pieces: Sequence[str]) -> Speller:
    """What sherpa-onnx writes for tokens of a transducer.

    It removes each space between Chinese, Japanese or Korean characters, since version 1.13.4 also each
    before a punctuation mark (its pull request 3709): ``TAKE 'EM`` becomes ``TAKE'EM``.
    """
    names = _names(pieces)
    return lambda ids: _closed_up(b"".join(names[i] for i in ids).decode("utf-8", "ignore"))


def _names(pieces: Sequence[str]) -> list[bytes]:
    """The bytes that sherpa-onnx appends to a text for each token."""
    first, last = (pieces.index(f) if f in pieces else -1 for f in ("<0x00>", "<0xFF>"))
    names = [" " + piece[1:] if piece.startswith(WORD_START) else piece for piece in pieces]
    found = [name.encode() for name in names]
    if first >= 0 and last - first == 255:  # tokens of single bytes
        found[first : last + 1] = [bytes([number]) for number in range(256)]
    return found


def _closed_up(text: str) -> str:
    """``text`` without the spaces that sherpa-onnx removes."""
    kept = [
        c
        for i, c in enumerate(text)
        if not (c == " " and 0 < i < len(text) - 1 and _touch(text[i - 1], text[i + 1]))
    ]
    return "".join(kept)


def _touch(before: str, after: str) -> bool:
    return _within(after, _PUNCTUATION) or (_within(before, _CJK) and _within(after, _CJK))


def _within(c: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(low <= ord(c) <= high for low, high in ranges)


def write_tokens(directory: Path) -> None:
    """Let sherpa-onnx read the ``tokens.txt`` in ``directory`` as what it is.

    It guesses from the bytes of all tokens whether they are byte-level BPE, and then joins words and makes
    other characters of letters such as ƙ or ơ. One token beyond those bytes ends the guess: the mark of a
    sentence's ends, which no CTC and no transducer says, is then written ``<sos/eos>…``.
    """
    path = directory / "tokens.txt"
    pieces = read_pieces(path)
    if taken_for_byte_bpe(pieces):
        pieces[SOS_EOS_ID] += "…"
        write_atomic(path, "".join(f"{piece} {i}\n" for i, piece in enumerate(pieces)))


def taken_for_byte_bpe(pieces: Sequence[str]) -> bool:
    """Whether no byte is above 0xC6 and some is, word-start marks aside."""
    found = {byte for piece in pieces for byte in piece.removeprefix(WORD_START).encode()}
    return max(found, default=0) == 0xC6
