"""Which utterances are alike: distances between them in the teacher and in the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import frame_mask, full_precision
from kdrecipe.interfaces import Batch, LossOutput, LossSetup, ModelOutput, Options, Targets, TargetSpec


class Rkd:
    """``sum over pairs (i, j) of utterances of huber(d_student(i, j) - d_teacher(i, j))``.

    ``d(i, j) = |e_i - e_j| / mean``, e being the mean of an utterance's hidden states over its valid frames,
    and the mean that of all distances above 0 in the batch; huber is quadratic up to 1. The distance-wise
    loss of relational knowledge distillation (Park 2019, arXiv 1904.05068; checked against open
    implementations).
    Widths and frame rates of the two may differ, and nothing is learnt along. Its angle-wise loss, over
    triples, is left out.

    Pairs are those of a batch that is computed at once: with ``accumulate``, within each of its batches.

    Count: pairs of utterances, each with itself too.

    Raises:
        RecipeError: a tap is not declared by its model.
    """

    per: ClassVar[str] = "pairs"
    contract_options: ClassVar[Mapping[str, Any]] = {"layer": "encoder.5"}
    tiny_options: ClassVar[Mapping[str, Any]] = {"layer": "encoder.0", "student_layer": None}

    class Config(Options):
        """Options of ``rkd``.

        Args:
            layer: the teacher's tap.
            student_layer: the student's tap, with the frames of its output; None: its encoder's output.
        """

        layer: str
        student_layer: str | None = None

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        tap = config.student_layer
        self.taps = (tap,) if tap is not None else ()
        if tap is not None and tap not in setup.student.taps:
            what = f"rkd: the student declares no tap {tap!r}"
            raise RecipeError(what, remedy=did_you_mean(tap, setup.student.taps))

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's hidden states, at whatever rate."""
        return [TargetSpec("hidden", config.layer, align="interpolate")]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over pairs; see the class."""
        tap, target = self.config.student_layer, targets.hidden(self.config.layer)
        mine_BTD = out.hidden_BTD if tap is None else out.taps[tap]
        used_B = (out.lens_B > 0) & (target.lens_B > 0)
        student_BB = _distances(_means(mine_BTD, out.lens_B)[used_B])
        teacher_BB = _distances(_means(target.values_BTD.detach(), target.lens_B)[used_B]).to(student_BB)
        total = F.smooth_l1_loss(student_BB, teacher_BB, reduction="sum")
        return LossOutput(total, student_BB.numel())


def _means(values_BTD: Tensor, lens_B: Tensor) -> Tensor:
    """(B, D) over the valid frames."""
    mask_BT1 = frame_mask(lens_B, values_BTD.shape[1])[..., None]
    total_BD = full_precision(values_BTD).masked_fill(~mask_BT1, 0.0).sum(1)
    return total_BD / lens_B.clamp(min=1)[:, None].to(total_BD.dtype)


def _distances(points_BD: Tensor) -> Tensor:
    """(B, B) Euclidean, divided by the mean of those that are above 0."""
    squares_BB = (points_BD[:, None] - points_BD).square().sum(-1)
    apart_BB = squares_BB > 1e-12
    # the root of 0 has no gradient
    distances_BB = squares_BB.where(apart_BB, torch.ones_like(squares_BB)).sqrt() * apart_BB
    return distances_BB * (apart_BB.sum() / distances_BB.sum().clamp(min=1e-12))


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``rkd`` known."""
    register("rkd", Rkd)
