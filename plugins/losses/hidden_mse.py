"""Squared error between hidden states of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import check_aligned, full_precision, valid_frames
from kdrecipe.interfaces import (
    Align,
    Batch,
    LossOutput,
    LossSetup,
    ModelInfo,
    ModelOutput,
    Options,
    Targets,
    TargetSpec,
)


class HiddenMse(nn.Module):
    """``sum over layer pairs and frames of mean over D of (W h_student - h_teacher)^2``.

    W, one per pair, is a linear map trained along with the student and thrown away after; where the
    widths are equal there is none. As in CoDERT (Swaminathan 2021, arXiv 2106.07734) and the layer-wise
    distillation of self-supervised encoders.

    Count: valid frames times layer pairs.

    Raises:
        RecipeError: a tap is not declared by its model.
        DataError: frame counts of student and teacher differ.
    """

    contract_options: ClassVar[Mapping[str, Any]] = {
        "layers": {"encoder.0": "encoder.1", "encoder.2": "encoder.5"}
    }

    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": {"encoder.0": "encoder.0"}}

    class Config(Options):
        """Options of ``hidden_mse``.

        Args:
            layers: student's tap -> teacher's tap, at least one pair.
            normalise: scale each target frame to mean 0 and variance 1 first (the teacher's
                layers differ in scale by orders of magnitude).
            align: where the teacher's frames are not the student's: ``mean``, ``stride`` or ``interpolate``,
                see :mod:`kdrecipe.targets.align`; None: they must be.
        """

        layers: dict[str, str] = Field(min_length=1)
        normalise: bool = False
        align: Align | None = None

    def __init__(self, config: Config, setup: LossSetup) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(config.layers)
        teacher = setup.teacher or setup.student
        projections: list[nn.Module] = []
        for student_tap, teacher_tap in config.layers.items():
            student_dim = _width(setup.student.taps, student_tap, "student")
            _check_frames(setup.student, student_tap)
            teacher_dim = _width(teacher.taps, teacher_tap, "teacher")
            same = student_dim == teacher_dim
            projections.append(nn.Identity() if same else nn.Linear(student_dim, teacher_dim))
        self.projections = nn.ModuleList(projections)

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's hidden states, each tap once."""
        taps = dict.fromkeys(config.layers.values())
        return [TargetSpec("hidden", tap, align=config.align) for tap in taps]

    def forward(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over pairs and valid frames; see the class."""
        targets = targets.map(Tensor.detach)
        terms = []
        for (student_tap, teacher_tap), project in zip(
            self.config.layers.items(), self.projections, strict=True
        ):
            target = targets.hidden(teacher_tap)
            check_aligned(out.lens_B, target.lens_B)
            guess_ND = full_precision(project(valid_frames(out.taps[student_tap], out.lens_B)))
            target_ND = valid_frames(target.values_BTD, target.lens_B).to(guess_ND.dtype)
            if self.config.normalise:
                target_ND = F.layer_norm(target_ND, target_ND.shape[-1:])
            terms.append((guess_ND - target_ND).square().mean(-1).sum())
        return LossOutput(sum(terms[1:], terms[0]), out.lens_B.sum() * len(terms))


def _width(taps: Mapping[str, int], tap: str, role: str) -> int:
    """D of a declared tap."""
    if tap not in taps:
        what = f"hidden_mse: the {role} declares no tap {tap!r}"
        raise RecipeError(what, remedy=did_you_mean(tap, taps))
    return taps[tap]


def _check_frames(student: ModelInfo, tap: str) -> None:
    """The student's tap must have a frame per frame of its encoder's output: lengths are taken from there."""
    if student.tap_shift_s(tap) != student.frame_shift_s:
        raise RecipeError(
            f"hidden_mse: the student's tap {tap!r} has a frame every {student.tap_shift_s(tap)} s, "
            f"its output every {student.frame_shift_s} s",
            remedy="choose a tap with the frames of the output",
        )


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``hidden_mse`` known."""
    register("hidden_mse", HiddenMse)
