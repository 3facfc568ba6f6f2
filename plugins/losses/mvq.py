"""The student predicts codebook indices of a teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import check_aligned, full_precision, valid_frames
from kdrecipe.interfaces import (
    CODEBOOK_SIZE,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Targets,
    TargetSpec,
)


class Mvq(nn.Module):
    """``sum over frames and codebooks j of -log softmax(W_j h + b_j)[c_j]``.

    Multi-codebook vector quantisation (Guo 2022, arXiv 2211.00508): c_j are the indices of the entries whose
    sum is near the teacher's hidden state (:mod:`kdrecipe.targets.quantiser`), h is the student's. icefall's
    ``JointCodebookLoss`` is this sum with ``is_joint=False``. On disk an index is a byte: at 25 frames
    a second, 16 codebooks are 1.4 MB per hour, where 256 dimensions in float16 are 46. W and b are trained
    along with the student and thrown away after.

    Count: valid frames. Metric ``right``: the indices that are predicted, per codebook.

    Raises:
        RecipeError: a tap is not declared, or the student's has other frames than its output.
        DataError: frame counts of student and teacher differ.
    """

    contract_options: ClassVar[Mapping[str, Any]] = {"layer": "encoder.5", "num_codebooks": 2}
    tiny_options: ClassVar[Mapping[str, Any]] = {
        "layer": "encoder.0",
        "student_layer": None,
        "num_codebooks": 2,
    }

    class Config(Options):
        """Options of ``mvq``.

        Args:
            layer: the teacher's tap.
            num_codebooks: bytes per frame, the more the nearer.
            student_layer: the student's tap; None: its encoder's output.
            align: ``stride``: where the teacher has more frames than the student, the one in the middle;
                None: they must be the same.
        """

        layer: str
        num_codebooks: int = Field(16, ge=1, le=64)
        student_layer: str | None = None
        align: Literal["stride"] | None = None

    def __init__(self, config: Config, setup: LossSetup) -> None:
        super().__init__()
        self.config = config
        student, tap = setup.student, config.student_layer
        self.taps = (tap,) if tap is not None else ()
        if tap is not None and tap not in student.taps:
            raise RecipeError(
                f"mvq: the student declares no tap {tap!r}", remedy=did_you_mean(tap, student.taps)
            )
        if tap is not None and student.tap_shift_s(tap) != student.frame_shift_s:
            raise RecipeError(
                f"mvq: the student's tap {tap!r} has a frame every {student.tap_shift_s(tap)} s, its output "
                f"every {student.frame_shift_s} s",
                remedy="leave student_layer out, or choose a tap with the frames of the output",
            )
        size = config.num_codebooks * CODEBOOK_SIZE
        width = student.taps[tap] if tap is not None else student.dim
        self.classifier = nn.Linear(width, size)

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The indices."""
        return [TargetSpec("codebooks", config.layer, config.num_codebooks, align=config.align)]

    def forward(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over valid frames and codebooks; see the class."""
        config = self.config
        target = targets.codes(config.layer, config.num_codebooks)
        check_aligned(out.lens_B, target.lens_B)
        hidden_BTD = out.hidden_BTD if config.student_layer is None else out.taps[config.student_layer]
        logits_NJK = self.classifier(valid_frames(hidden_BTD, out.lens_B)).unflatten(-1, (-1, CODEBOOK_SIZE))
        codes_NJ = valid_frames(target.indices_BTN, target.lens_B)
        logits_NJK = full_precision(logits_NJK)
        total = F.cross_entropy(logits_NJK.flatten(0, 1), codes_NJ.flatten(), reduction="sum")
        right = (logits_NJK.argmax(-1) == codes_NJ).sum() / config.num_codebooks
        return LossOutput(total, len(codes_NJ), {"right": right})


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``mvq`` known."""
    register("mvq", Mvq)
