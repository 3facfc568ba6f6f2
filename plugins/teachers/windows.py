"""Audio of any length for a model that hears a fixed stretch: windows, and their answers in a row.

B utterances, S samples, T frames, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kdrecipe.corpus.segments import SHORTEST_S, segments
from kdrecipe.errors import DataError
from kdrecipe.interfaces import FRAME_SAMPLES, SAMPLE_RATE, Batch

WINDOW_STEP = 4 * FRAME_SAMPLES
"""Windows begin at multiples of 0.04 s, so that frames of 0.02 and 0.04 s go on as if there were none."""


@dataclass(frozen=True)
class Window:
    """A stretch of an utterance.

    Args:
        row: of the batch.
        samples_S: float32, on the CPU.
    """

    row: int
    samples_S: Tensor

    @property
    def audible(self) -> bool:
        """Whether it is long enough to hold any speech."""
        return len(self.samples_S) >= SHORTEST_S * SAMPLE_RATE


def audio_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Samples (B, S) and their numbers (B,).

    Raises:
        DataError: the batch has no audio.
    """
    if batch.samples_BS is None or batch.sample_lens_B is None:
        raise DataError("the teacher hears audio, and the batch has none", where="+".join(batch.ids[:3]))
    return batch.samples_BS.float(), batch.sample_lens_B


def windows_of(batch: Batch, longest_s: float) -> list[Window]:
    """All windows of a batch, in order: at most ``longest_s`` each, cut where it is quiet; one at least."""
    samples_BS, sample_lens_B = audio_of(batch)
    found = []
    for row, length in enumerate(sample_lens_B.tolist()):
        samples_S = samples_BS[row, :length].cpu()
        found += [Window(row, part_S) for part_S in _parts(samples_S, longest_s)]
    return found


def _parts(samples_S: Tensor, longest_s: float) -> Iterator[Tensor]:
    step_s = WINDOW_STEP / SAMPLE_RATE
    if len(samples_S) <= longest_s * SAMPLE_RATE:
        yield samples_S
        return
    # room for moving a start to the step before it, and for an end below what segments() calls audio
    starts_s = [start for start, _ in segments([samples_S.numpy()], SAMPLE_RATE, longest_s - 2 * step_s)]
    starts = [int(start * SAMPLE_RATE + 0.5) // WINDOW_STEP * WINDOW_STEP for start in starts_s]
    for start, end in zip(starts, [*starts[1:], len(samples_S)], strict=True):
        yield samples_S[start:end]


def in_rows(parts: Sequence[Tensor], rows: Sequence[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """Windows' answers (T, D), one after the other in their rows: (B, T, D), padded with 0, and lengths."""
    lens_B = torch.zeros(num_rows, dtype=torch.int64)
    starts = []
    for part_TD, row in zip(parts, rows, strict=True):
        starts.append(int(lens_B[row]))
        lens_B[row] += len(part_TD)
    values_BTD = parts[0].new_zeros(num_rows, int(lens_B.max()), parts[0].shape[-1])
    for part_TD, row, start in zip(parts, rows, starts, strict=True):
        values_BTD[row, start : start + len(part_TD)] = part_TD
    return values_BTD, lens_B.to(parts[0].device)


def split_text(text: str, said: Sequence[str]) -> list[str]:
    """The part of ``text`` in each window, by what was recognised there.

    A window ends after the last word that its recognition shares with the text; words that nobody heard go
    to the window after.

    Args:
        text: the transcript of all windows.
        said: what was recognised in each.
    """
    words = text.split()
    heard = [[_plain(word) for word in part.split()] for part in said]
    all_heard = [word for part in heard for word in part]
    matcher = difflib.SequenceMatcher(None, [_plain(word) for word in words], all_heard, autojunk=False)
    pairs = [(m.a + i, m.b + i) for m in matcher.get_matching_blocks() for i in range(m.size)]
    ends, num_heard = [0], 0
    for part in heard[:-1]:
        num_heard += len(part)
        ends.append(max((a + 1 for a, b in pairs if b < num_heard), default=0))
    ends.append(len(words))
    return [" ".join(words[start:end]) for start, end in pairwise(ends)]


def _plain(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum()) or word
