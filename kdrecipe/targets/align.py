"""Targets of a teacher whose frames are not the student's, brought to the student's frames.

Frame n of a model with frame shift r covers the seconds n r to (n + 1) r. ``mean`` averages the teacher's
frames within, ``stride`` takes the one in their middle (of an even number, the earlier), and ``interpolate``
goes linearly between the two nearest centres.

B utterances, T frames of the teacher, N frames of the student, M frames that one is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.interfaces import Align, Batch, Targets, TargetSpec, whole_factor
from kdrecipe.targets import TargetSource
from kdrecipe.targets.kinds import kind_of, lens_of
from kdrecipe.targets.kinds.weights import FrameWeights


@dataclass
class Counts:
    """What alignment did at the ends of utterances.

    Args:
        frames: of the student.
        padded: of them, beyond the teacher's last: that is repeated.
        dropped: frames of the student's length that the teacher has beyond its last.
    """

    frames: int = 0
    padded: int = 0
    dropped: int = 0


class AlignedTargets:
    """A source whose targets stand at the student's frames.

    Args:
        source: the teacher's own.
        needs: what the student's losses ask for, with the student's frame shifts; those with ``align`` are
            brought there.
        gives: what the source gives of each, with the teacher's frame shifts.
        student_lens: of each need, the student's frames of a batch (B,) int64.
    """

    def __init__(
        self,
        source: TargetSource,
        needs: Mapping[str, TargetSpec],
        gives: Mapping[str, TargetSpec],
        student_lens: Callable[[TargetSpec, Batch], Tensor],
    ) -> None:
        self._source = source
        self._ratios = {}
        for key, need in needs.items():
            its = gives[key].frame_shift_s
            if need.align is not None and need.frame_shift_s and its and its != need.frame_shift_s:
                self._ratios[key] = need, need.frame_shift_s / its
        self._student_lens = student_lens
        self.counts: dict[str, Counts] = {key: Counts() for key in self._ratios}

    @property
    def hears_audio(self) -> bool:
        """As the source."""
        return self._source.hears_audio

    def targets(self, batch: Batch) -> Targets:
        """All targets for ``batch``.

        Raises:
            DataError: an utterance has more than one frame more or less than the student's.
        """
        found = self._source.targets(batch)
        items: dict[str, Any] = dict(found.items)
        for key, (need, ratio) in self._ratios.items():
            lens_B = self._student_lens(need, batch).to(lens_of(items[key]).device)
            self._count(key, batch, lens_of(items[key]) / ratio, lens_B)
            assert need.align is not None
            weights = frame_weights(need.align, ratio, lens_of(items[key]), lens_B)
            items[key] = kind_of(need).weighted(items[key], weights)
        return replace(found, items=items)

    def said(self) -> Iterator[str]:
        """A line for each target that was padded or cut at the end of utterances."""
        for key, counts in self.counts.items():
            if counts.padded or counts.dropped:
                ends = f"{counts.padded} frames padded, {counts.dropped} dropped"
                yield f"{key}: {ends} at the ends of utterances, of {counts.frames}"

    def _count(self, key: str, batch: Batch, has_B: Tensor, wants_B: Tensor) -> None:
        more_B = has_B - wants_B
        if bool((more_B.abs() > 1.01).any()):
            row = int((more_B.abs() > 1.01).nonzero()[0])
            raise DataError(
                f"{key}: the student has {int(wants_B[row])} frames, the teacher's make "
                f"{float(has_B[row]):.1f} of that length: more than one frame apart",
                where=batch.ids[row],
                remedy="they must hear the same audio; look at the frame shift that the teacher declares",
            )
        counts = self.counts[key]
        counts.frames += int(wants_B.sum())
        counts.padded += int((more_B <= -0.5).sum())
        counts.dropped += int((more_B >= 0.5).sum())


def frame_weights(how: Align, ratio: float, from_lens_B: Tensor, to_lens_B: Tensor) -> FrameWeights:
    """How the student's frames are made of the teacher's.

    Args:
        how: see the module.
        ratio: the student's frame shift over the teacher's; whole for ``mean`` and ``stride``.
        from_lens_B: the teacher's valid frames.
        to_lens_B: the student's.

    Raises:
        ValueError: the ratio has to be whole, and is not.
    """
    num = int(to_lens_B.max()) if len(to_lens_B) else 0
    frames_N = torch.arange(num, device=to_lens_B.device)
    last_B11 = (from_lens_B - 1).clamp(min=0)[:, None, None]
    if how == "interpolate":
        at_N = (frames_N + 0.5) * ratio - 0.5
        low_N = at_N.floor()
        pair_N2 = torch.stack([low_N, low_N + 1], -1).long()
        high_N = (at_N - low_N).to(torch.float32)
        weights_BNM = torch.stack([1 - high_N, high_N], -1).expand(len(to_lens_B), -1, -1)
        return FrameWeights(pair_N2.clamp(min=0).minimum(last_B11), weights_BNM, to_lens_B)
    factor = whole_factor(ratio)
    if factor is None:
        raise ValueError(f"{how} needs a whole number of frames to one, not {ratio:g}")
    if how == "stride":
        middle_N1 = (frames_N * factor + (factor - 1) // 2)[:, None]
        at_BNM = middle_N1.minimum(last_B11)
        return FrameWeights(at_BNM, torch.ones_like(at_BNM, dtype=torch.float32), to_lens_B)
    group_NM = frames_N[:, None] * factor + torch.arange(factor, device=frames_N.device)
    valid_BNM = (group_NM <= last_B11).float()
    none_BN1 = valid_BNM.sum(-1, keepdim=True) == 0  # beyond the last frame: that one
    weights_BNM = torch.where(
        none_BN1, 1.0 / factor, valid_BNM / valid_BNM.sum(-1, keepdim=True).clamp(min=1)
    )
    return FrameWeights(group_NM.minimum(last_B11), weights_BNM, to_lens_B)
