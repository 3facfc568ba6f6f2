"""CTC layers at intermediate layers of the student, which learn from posteriors at its top or its teacher's.

B utterances, T frames, V vocabulary, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import ctc_nll, full_precision, keep_top
from kdrecipe.interfaces import (
    Align,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Posteriors,
    Targets,
    TargetSpec,
)

from .hidden import check_tap_frames
from .posteriors import compare, kl


class InterOptions(Options):
    """Where the layers are, and what they learn.

    Args:
        layers: the student's taps, at least one.
        ctc_weight: of the CTC loss of each layer on labelled utterances, relative to its KL; both are divided
            by the same count, frames.
        temperature: T of the KL, above 0.
    """

    layers: list[str] = Field(min_length=1)
    ctc_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class _InterLoss(nn.Module):
    """KL and CTC at a linear layer on each tap."""

    name: ClassVar[str]
    contract_options: ClassVar[Mapping[str, Any]] = {"layers": ["encoder.0", "encoder.2"]}
    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": ["encoder.0"]}

    def __init__(self, config: Any, setup: LossSetup) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(dict.fromkeys(config.layers))
        student = setup.student
        setup.require_head("ctc", self.name)
        for tap in self.taps:
            if tap not in student.taps:
                what = f"{self.name}: the student declares no tap {tap!r}"
                raise RecipeError(what, remedy=did_you_mean(tap, student.taps))
            check_tap_frames(student, tap, self.name)
        self.layers = nn.ModuleList(nn.Linear(student.taps[tap], student.vocab_size) for tap in self.taps)

    def forward(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over layers and valid frames; see the class."""
        taught_by = self.taught_by(out, targets)
        used_B = batch.labelled_B & (batch.token_lens_B > 0)
        total = agree = out.lens_B.new_zeros(())
        for tap, layer in zip(self.taps, self.layers, strict=True):
            logits_BTV = layer(out.taps[tap])
            both = compare(logits_BTV, out.lens_B, taught_by, self.config.temperature)
            total = total + self.config.temperature**2 * kl(both.log_p_NK, both.log_q_NK).sum()
            if self.config.ctc_weight:
                nll_B = ctc_nll(logits_BTV, out.lens_B, batch.tokens_BU, batch.token_lens_B)
                total = total + self.config.ctc_weight * nll_B.where(used_B, 0.0).sum()
            agree = agree + (both.log_p_NK.argmax(-1) == both.log_q_NK.argmax(-1)).sum()
        return LossOutput(total, out.lens_B.sum() * len(self.taps), {"agree": agree})

    @abstractmethod
    def taught_by(self, out: ModelOutput, targets: Targets) -> Posteriors:
        """What the layers learn from."""


class InterCtcKl(_InterLoss):
    """``sum over layers l of T^2 KL(p || softmax(W_l h_l)) + ctc_weight * CTC(softmax(W_l h_l))``.

    Inter-KD (Yoon 2022, arXiv 2211.15075): the teacher's CTC posteriors p teach CTC layers at intermediate
    layers of the student as well, whose lower layers get little gradient through a deep encoder. W_l are
    linear layers of their own, thrown away after. Combine it with ``kl`` and ``ctc`` at the top.

    Both parts are summed and divided by frames. The CTC part sees labelled utterances only, the KL all.
    With top-k targets the KL is over the K kept classes and the rest, K + 1 classes.

    Count: valid frames times layers. Metric ``agree``: those whose best class is the teacher's.

    Raises:
        RecipeError: a tap that the student does not declare, other tokens than the teacher's, or no head
            ``ctc``.
        DataError: frame counts of student and teacher differ.
    """

    name = "inter_ctc_kl"

    class Config(InterOptions):
        """Options of ``inter_ctc_kl``.

        Args:
            top_k: classes kept per frame; None: all.
            align: where the teacher's frames are not the student's: ``mean``, ``stride`` or ``interpolate``,
                see :mod:`kdrecipe.targets.align`; None: they must be.
        """

        top_k: int | None = Field(None, ge=1)
        align: Align | None = None

    def __init__(self, config: Config, setup: LossSetup) -> None:
        super().__init__(config, setup)
        setup.require_same_tokens(self.name)

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's posteriors."""
        return [TargetSpec("frame_logits", "ctc", top_k=config.top_k, align=config.align)]

    def taught_by(self, out: ModelOutput, targets: Targets) -> Posteriors:
        """The teacher."""
        return keep_top(targets.posteriors("ctc"), self.config.top_k)


class SelfCtcKl(_InterLoss):
    """``sum over layers l of T^2 KL(sg q || softmax(W_l h_l)) + ctc_weight * CTC(softmax(W_l h_l))``.

    q are the student's own posteriors at the top, sg: no gradient. Self-distillation within one network has
    no disagreement between the alignments of two (Kim 2024, arXiv 2406.07909, whose weights shift from one
    to the other over training; here they are constant). It needs no teacher. W_l are thrown away after.

    Count: valid frames times layers. Metric ``agree``: those whose best class is the one at the top.

    Raises:
        RecipeError: a tap that the student does not declare; no head ``ctc``.
    """

    name = "self_ctc_kl"
    expected_failed_checks: ClassVar[dict[str, str]] = {
        "gradcheck": "the stop-gradient is part of the loss: its gradient is not that of its value",
    }

    class Config(InterOptions):
        """Options of ``self_ctc_kl``."""

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """Nothing: the student teaches itself."""
        return []

    def taught_by(self, out: ModelOutput, targets: Targets) -> Posteriors:
        """The student at its top; what is compared as a teacher's never carries a gradient."""
        return Posteriors(full_precision(out.logits["ctc"]).log_softmax(-1), out.lens_B)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``inter_ctc_kl`` and ``self_ctc_kl`` known."""
    register("inter_ctc_kl", InterCtcKl)
    register("self_ctc_kl", SelfCtcKl)
