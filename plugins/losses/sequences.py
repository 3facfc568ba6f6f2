"""Losses on whole texts that a teacher's CTC head finds: no frame of the two models need fall together.

B utterances, N texts of each, U tokens, T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdrecipe import hookimpl
from kdrecipe.frames import MIN_LOG_PROB, ctc_nll_of_texts, ctc_text, frames_needed
from kdrecipe.interfaces import (
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    NBest,
    Options,
    Targets,
    TargetSpec,
)

from .spikes import best_classes


class TextOptions(Options):
    """Which texts.

    Args:
        num_texts: N, the teacher's best texts of each utterance: 1 by its best path, several by prefix beam
            search.
    """

    num_texts: int = Field(1, ge=1)


class CtcBestPath:
    """``sum over utterances of CTC(student, y)``, y the text of the teacher's best path.

    SpeechBrain's ``ctc_loss_kd``, which names Gao 2020 (arXiv 2005.09310). It reads the best class of each
    frame, which any CTC teacher has, imported ones too; for a teacher with other frames than the student's,
    there is ``ctc_nbest``.

    Empty texts are left out, and those for which the student has too few frames (metric ``infeasible``, the
    number of them).

    Count: tokens of the texts.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head ``ctc``.
    """

    expected_failed_checks: ClassVar[dict[str, str]] = {
        "minimum_at_teacher": "it is least where the student gives the text all its probability",
    }

    class Config(Options):
        """``ctc_best_path`` has no options."""

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "ctc_best_path")
        setup.require_same_tokens("ctc_best_path")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's best class of each frame."""
        return [TargetSpec("frame_logits", "ctc", top_k=1)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over utterances; see the class."""
        teacher = targets.posteriors("ctc")
        found = [torch.tensor(text) for text in ctc_text(best_classes(teacher), teacher.lens_B)[0]]
        tokens_BU = pad_sequence(found, batch_first=True).long().to(out.lens_B.device)
        lens_B = torch.tensor([len(text) for text in found], device=out.lens_B.device)
        texts = NBest(tokens_BU[:, None], lens_B[:, None], torch.zeros_like(lens_B[:, None]).float())
        return weighted_ctc(out, texts)


class CtcNBest:
    """``sum over utterances and the teacher's N best texts y_n of P_n CTC(student, y_n)``, sum of P_n = 1.

    P_n is the share of y_n in the teacher's probability of all N. Sequence-level distillation of CTC models,
    after Gao 2020 (arXiv 2005.09310); with one text, the CTC loss on that of the teacher's best path. Frame
    rates and alignments may differ, and a few bytes per utterance are cached.

    Empty texts are left out, and those for which the student has too few frames (metric ``infeasible``, the
    number of them).

    Count: tokens of the texts, weighted by P_n.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head ``ctc``.
    """

    contract_options: ClassVar[dict[str, int]] = {"num_texts": 4}
    expected_failed_checks: ClassVar[dict[str, str]] = {
        "minimum_at_teacher": "it is least where the student gives the texts all its probability",
    }

    class Config(TextOptions):
        """Options of ``ctc_nbest``."""

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "ctc_nbest")
        setup.require_same_tokens("ctc_nbest")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's best texts."""
        return [TargetSpec("hypotheses", "ctc", dtype="float32", top_k=config.num_texts)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over utterances; see the class."""
        return weighted_ctc(out, _best(targets.hypotheses("ctc"), self.config.num_texts))


def weighted_ctc(out: ModelOutput, texts: NBest) -> LossOutput:
    """CTC on the texts of each utterance, weighted by their probabilities, which are scaled to sum to 1."""
    used_BN, infeasible_BN = _used(texts, out.lens_B)
    nll_BN = ctc_nll_of_texts(out.logits["ctc"], out.lens_B, texts.tokens_BNU, texts.token_lens_BN)
    shares_BN = texts.log_probs_BN.detach().to(nll_BN.dtype).softmax(-1).where(used_BN, 0.0)
    # not a product alone: what is left out must not bring NaN along
    total = (shares_BN * nll_BN.where(used_BN, 0.0)).sum()
    count = (shares_BN * texts.token_lens_BN).sum()
    return LossOutput(total, count, {"infeasible": infeasible_BN.sum()})


class CtcFullSum:
    """``sum over utterances and the teacher's N best texts y of d(log P_teacher(y), log P_student(y))``.

    P(y) sums over all alignments, d is the absolute difference (``distance: l1``) or its square (``l2``).
    Full-sum distillation after Zeineldeen 2023 (arXiv 2303.05958), there of transducers (``rnnt_full_sum``):
    a poor teacher's texts are not taken for true, only its doubt about them is learnt, and neither frame
    rates nor alignments need agree. With ``normalise: true``, after the paper's sequence-discriminative form,
    P is scaled to sum to 1 over the N texts in both models: which of them is the better one.

    Empty texts are left out, and those for which the student has too few frames (metric ``infeasible``, the
    number of them).

    Count: tokens of the texts.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head ``ctc``.
    """

    contract_options: ClassVar[dict[str, int]] = {"num_texts": 4}
    expected_failed_checks: ClassVar[dict[str, str]] = {
        "minimum_at_teacher": "an absolute difference has no gradient of 0 beside its least, only at it",
    }

    class Config(TextOptions):
        """Options of ``ctc_full_sum``.

        Args:
            distance: ``l1`` or ``l2``.
            normalise: over the N texts, at least 2.
        """

        distance: Literal["l1", "l2"] = "l1"
        normalise: bool = False

        def model_post_init(self, context: object, /) -> None:
            if self.normalise and self.num_texts == 1:
                raise ValueError("normalise: true is over the texts of an utterance: set num_texts above 1")

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head("ctc", "ctc_full_sum")
        setup.require_same_tokens("ctc_full_sum")

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's best texts."""
        return [TargetSpec("hypotheses", "ctc", dtype="float32", top_k=config.num_texts)]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over utterances and texts; see the class."""
        texts = _best(targets.hypotheses("ctc"), self.config.num_texts)
        used_BN, infeasible_BN = _used(texts, out.lens_B)
        nll_BN = ctc_nll_of_texts(out.logits["ctc"], out.lens_B, texts.tokens_BNU, texts.token_lens_BN)
        log_p_BN, log_q_BN = texts.log_probs_BN.detach().to(nll_BN.dtype), -nll_BN
        if self.config.normalise:
            log_p_BN, log_q_BN = (
                x_BN.where(used_BN, MIN_LOG_PROB).log_softmax(-1) for x_BN in (log_p_BN, log_q_BN)
            )
        total = distances(log_p_BN, log_q_BN, self.config.distance).where(used_BN, 0.0).sum()
        count = texts.token_lens_BN.where(used_BN, 0).sum()
        return LossOutput(total, count, {"infeasible": infeasible_BN.sum()})


def distances(log_p: Tensor, log_q: Tensor, distance: Literal["l1", "l2"]) -> Tensor:
    """Absolute or squared differences."""
    return (F.l1_loss if distance == "l1" else F.mse_loss)(log_q, log_p, reduction="none")


def _best(texts: NBest, num_texts: int) -> NBest:
    """The first of them."""
    return NBest(*(x[:, :num_texts] for x in (texts.tokens_BNU, texts.token_lens_BN, texts.log_probs_BN)))


def _used(texts: NBest, lens_B: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (B, N): texts that are there, not empty and have frames enough; those that have not."""
    each = zip(texts.tokens_BNU.unbind(1), texts.token_lens_BN.unbind(1), strict=True)
    fits_BN = torch.stack([frames_needed(*text) for text in each], dim=1) <= lens_B[:, None]
    spoken_BN = texts.token_lens_BN > 0
    return spoken_BN & fits_BN, spoken_BN & ~fits_BN


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``ctc_best_path``, ``ctc_nbest`` and ``ctc_full_sum`` known."""
    register("ctc_best_path", CtcBestPath)
    register("ctc_nbest", CtcNBest)
    register("ctc_full_sum", CtcFullSum)
