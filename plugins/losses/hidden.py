"""Losses between hidden states of student and teacher, layer by layer.

B utterances, T frames, N valid frames in a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import blank_probs, check_aligned, frame_mask, full_precision, valid_frames
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


class LayerOptions(Options):
    """Which layers are compared.

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


class HiddenLoss(nn.Module):
    """``sum over layer pairs and frames of`` :meth:`distance` ``of W h_student and h_teacher``.

    W, one per pair, is a linear map trained along with the student and thrown away after; where the
    widths are equal there is none. A loss derives from it, says its ``name``, gives its ``Config`` the base
    :class:`LayerOptions`, and defines :meth:`distance`.

    Count: valid frames times layer pairs.

    Raises:
        RecipeError: a tap is not declared by its model.
        DataError: frame counts of student and teacher differ.
    """

    name: ClassVar[str]
    contract_options: ClassVar[Mapping[str, Any]] = {
        "layers": {"encoder.0": "encoder.1", "encoder.2": "encoder.5"}
    }
    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": {"encoder.0": "encoder.0"}}

    def __init__(self, config: Any, setup: LossSetup) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(config.layers)
        teacher = setup.teacher or setup.student
        projections: list[nn.Module] = []
        for student_tap, teacher_tap in config.layers.items():
            student_dim = self._width(setup.student.taps, student_tap, "student")
            check_tap_frames(setup.student, student_tap, self.name)
            teacher_dim = self._width(teacher.taps, teacher_tap, "teacher")
            projections.append(self.projection(student_dim, teacher_dim))
        self.projections = nn.ModuleList(projections)

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
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
            guess_ND = full_precision(self.projected(project, out.taps[student_tap], out.lens_B))
            target_ND = valid_frames(target.values_BTD, target.lens_B).to(guess_ND.dtype)
            if self.config.normalise:
                target_ND = F.layer_norm(target_ND, target_ND.shape[-1:])
            distance_N = self.distance(guess_ND, target_ND)
            terms.append((distance_N * self.weights(targets, out.lens_B).to(distance_N.dtype)).sum())
        return LossOutput(sum(terms[1:], terms[0]), out.lens_B.sum() * len(terms))

    def projection(self, student_dim: int, teacher_dim: int) -> nn.Module:
        """W of a pair."""
        return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)

    def projected(self, project: nn.Module, hidden_BTD: Tensor, lens_B: Tensor) -> Tensor:
        """(N, D) of the teacher's width."""
        guess_ND: Tensor = project(valid_frames(hidden_BTD, lens_B))
        return guess_ND

    def distance(self, guess_ND: Tensor, target_ND: Tensor) -> Tensor:
        """(N,) of each frame."""
        raise NotImplementedError

    def weights(self, targets: Targets, lens_B: Tensor) -> Tensor:
        """Of the frames: (N,), or a scalar for all."""
        return lens_B.new_ones(())

    def _width(self, taps: Mapping[str, int], tap: str, role: str) -> int:
        """D of a declared tap."""
        if tap not in taps:
            what = f"{self.name}: the {role} declares no tap {tap!r}"
            raise RecipeError(what, remedy=did_you_mean(tap, taps))
        return taps[tap]


def check_tap_frames(student: ModelInfo, tap: str, loss: str) -> None:
    """The student's tap must have a frame per frame of its encoder's output: lengths are taken from there.

    Raises:
        RecipeError: naming both frame shifts.
    """
    if student.tap_shift_s(tap) != student.frame_shift_s:
        raise RecipeError(
            f"{loss}: the student's tap {tap!r} has a frame every {student.tap_shift_s(tap)} s, "
            f"its output every {student.frame_shift_s} s",
            remedy="choose a tap with the frames of the output",
        )


class HiddenMse(HiddenLoss):
    """``sum over layer pairs and frames of mean over D of (W h_student - h_teacher)^2``.

    The layer-wise distillation of self-supervised encoders; between the last layers of two transducers, after
    CoDERT (Swaminathan 2021, arXiv 2106.07734), which distils the encoder rather than the lattice.

    W is a linear map, see :class:`HiddenLoss`.
    """

    name = "hidden_mse"

    class Config(LayerOptions):
        """Options of ``hidden_mse``."""

    def distance(self, guess_ND: Tensor, target_ND: Tensor) -> Tensor:
        """Mean squared difference."""
        return (guess_ND - target_ND).square().mean(-1)


class HiddenL1Cos(HiddenLoss):
    """``sum over layer pairs and frames of mean over D of |W h - h_t| - lambda log sigmoid(cos(W h, h_t))``.

    DistilHuBERT (Chang 2021, arXiv 2110.01900); with ``cosine: raw`` the second term is -lambda cos, which
    DPHuBERT offers as well (Peng 2023, arXiv 2305.17651); both as in the authors' code. The L1 distance bears
    the few large components of self-supervised states better than squares do, and the cosine sees directions
    whatever the scale. The least is lambda log(1 + 1/e), with raw cosines -lambda, not 0.
    """

    name = "hidden_l1_cos"

    class Config(LayerOptions):
        """Options of ``hidden_l1_cos``.

        Args:
            cos_weight: lambda.
            cosine: ``log_sigmoid`` or ``raw``.
        """

        cos_weight: float = Field(1.0, ge=0)
        cosine: Literal["log_sigmoid", "raw"] = "log_sigmoid"

    def distance(self, guess_ND: Tensor, target_ND: Tensor) -> Tensor:
        """L1 and cosine."""
        cos_N = F.cosine_similarity(guess_ND, target_ND, dim=-1)
        if self.config.cosine == "log_sigmoid":
            cos_N = F.logsigmoid(cos_N)
        distance_N: Tensor = (guess_ND - target_ND).abs().mean(-1) - self.config.cos_weight * cos_N
        return distance_N


class FitnetsHint(HiddenLoss):
    """``sum over layer pairs and frames of 1/2 mean over D of (r(h_student) - h_teacher)^2``.

    FitNets (Romero 2014, arXiv 1412.6550): r, the regressor, is a convolution, here over ``kernel`` frames,
    also where the widths are equal; it is thrown away after. The teacher's *hint* layer and the student's
    *guided* one are middle layers there, and the hint is learnt before all else: train one system with this
    loss alone, and start the next with it (``init_from``). FitHuBERT (Lee 2022, arXiv 2207.00555) has such
    hints for thin and deep speech encoders. A teacher with more frames per second is brought to the
    student's by ``align``; a student is never stretched to the teacher's.
    """

    name = "fitnets_hint"

    class Config(LayerOptions):
        """Options of ``fitnets_hint``.

        Args:
            kernel: frames that the regressor sees, an odd number.
        """

        kernel: int = Field(3, ge=1)

        def model_post_init(self, context: object, /) -> None:
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel: {self.kernel} is even; the regressor is centred on a frame")

    def projection(self, student_dim: int, teacher_dim: int) -> nn.Module:
        """r of a pair."""
        kernel = self.config.kernel
        return nn.Conv1d(student_dim, teacher_dim, kernel, padding=kernel // 2)

    def projected(self, project: nn.Module, hidden_BTD: Tensor, lens_B: Tensor) -> Tensor:
        """r, to which padding is 0."""
        mask_BT1 = frame_mask(lens_B, hidden_BTD.shape[1])[..., None]
        regressed_BDT = project(hidden_BTD.masked_fill(~mask_BT1, 0.0).transpose(1, 2))
        return valid_frames(regressed_BDT.transpose(1, 2), lens_B)

    def distance(self, guess_ND: Tensor, target_ND: Tensor) -> Tensor:
        """Half the mean squared difference."""
        return (guess_ND - target_ND).square().mean(-1) / 2


class HiddenWeighted(HiddenMse):
    """``sum over layer pairs and frames of (1 - p_t(blank)) mean over D of (W h_student - h_teacher)^2``.

    After the representation-level distillation of TutorNet (Yoon 2021, arXiv 2008.00671), for networks of
    different kinds: frames on which the teacher's CTC says a token weigh most. It initialises the student
    there, before it learns its task: train one system with this loss alone, and start the next with it
    (``init_from``).

    It needs the teacher's ``ctc`` posteriors beside its hidden states, over the student's tokens. Where the
    blank is not among the ``top_k`` best classes, the most that it can be is taken.

    Count: valid frames times layer pairs, whatever their weights.
    """

    name = "hidden_weighted"

    class Config(LayerOptions):
        """Options of ``hidden_weighted``.

        Args:
            top_k: classes kept per frame to find the blank's posterior.
        """

        top_k: int | None = Field(4, ge=1)

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """The teacher's hidden states and its posteriors."""
        posteriors = TargetSpec("frame_logits", "ctc", top_k=config.top_k, align=config.align)
        return [*HiddenMse.requires(config), posteriors]

    def weights(self, targets: Targets, lens_B: Tensor) -> Tensor:
        """What is not blank."""
        posteriors = targets.posteriors("ctc")
        check_aligned(lens_B, posteriors.lens_B)
        return 1 - valid_frames(blank_probs(posteriors), posteriors.lens_B)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make them known."""
    for cls in (HiddenMse, HiddenL1Cos, FitnetsHint, HiddenWeighted):
        register(cls.name, cls)
