"""Other measures than KL between the posteriors of teacher and student, frame by frame (or token by token).

N frames in a row, K classes compared, see :mod:`.posteriors`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kdrecipe import hookimpl

from .posteriors import Compared, FrameOptions, PosteriorLoss, SoftOptions, TopKOptions, kl

TINY_DEVIATION = 1e-10  # product of two deviations below which a correlation is taken to be 0


class SkewKl(PosteriorLoss):
    """``T^2 * sum over frames of KL(p || a p + (1 - a) q)``, p the teacher, q the student, a = ``skew``.

    DistiLLM (Ko 2024, arXiv 2402.03898). The teacher's share bounds it by -log a per frame, and its
    gradient where the student rules out what the teacher says. ``direction: reverse`` is
    KL(q || a q + (1 - a) p). With a = 0 both are those of ``kl``.

    With top-k targets it is over the K kept classes and the rest, K + 1 classes.
    """

    name = "skew_kl"

    class Config(TopKOptions):
        """Options of ``skew_kl``.

        Args:
            skew: a, in [0, 1); 0.1 in the authors' code.
            direction: ``forward`` or ``reverse``, see the class.
        """

        skew: float = Field(0.1, ge=0, lt=1)
        direction: Literal["forward", "reverse"] = "forward"

    def divergence(self, both: Compared) -> Tensor:
        """Skew KL in the direction that is configured."""
        first_NK, second_NK = both.log_p_NK, both.log_q_NK
        if self.config.direction == "reverse":
            first_NK, second_NK = second_NK, first_NK
        return kl(first_NK, mixture(first_NK, second_NK, 1 - self.config.skew))


class JensenShannon(PosteriorLoss):
    """``T^2 * sum over frames of (1 - w) KL(p || m) + w KL(q || m)``, m = (1 - w) p + w q, w = ``share``.

    With w = 1/2, the Jensen-Shannon divergence of f-DISTILL (Wen 2023, arXiv 2307.15190): symmetric and at
    most log 2 per frame, so that no frame dominates. With w near 1 it is about (1 - w) KL(p || q), near 0
    about w KL(q || p).

    With top-k targets it is over the K kept classes and the rest, K + 1 classes.
    """

    name = "jsd"

    class Config(TopKOptions):
        """Options of ``jsd``.

        Args:
            share: w, of the student in m, between 0 and 1.
        """

        share: float = Field(0.5, gt=0, lt=1)

    def divergence(self, both: Compared) -> Tensor:
        """Both KLs to the mixture."""
        share = self.config.share
        log_m_NK = mixture(both.log_p_NK, both.log_q_NK, share)
        divergence_N: Tensor = (1 - share) * kl(both.log_p_NK, log_m_NK) + share * kl(both.log_q_NK, log_m_NK)
        return divergence_N


def mixture(log_p_NK: Tensor, log_q_NK: Tensor, share: float) -> Tensor:
    """log((1 - share) p + share q)."""
    if share == 1:
        return log_q_NK
    return torch.logaddexp(log_p_NK + log(1 - share), log_q_NK + log(share))


class DecoupledKl(PosteriorLoss):
    """``T^2 * sum over frames of alpha TCKD + beta NCKD``: KL split at a target class.

    TCKD is the KL of (target, all others together), NCKD that of the others among themselves, scaled to 1
    without the target (Zhao 2022, arXiv 2203.08679). KL is TCKD + (1 - p(target)) NCKD: where the teacher is
    sure of the target, it says next to nothing of the others. In CTC that is so on blank frames; by default
    the target is the blank, which for a recogniser is ours, as the paper's is the label. beta = 8 in the
    paper's images; on blank frames the others are mostly noise, hence 1.

    With top-k targets the rest is one of the classes; where it holds the blank, it is the target.
    """

    name = "dkd"

    class Config(TopKOptions):
        """Options of ``dkd``.

        Args:
            target: ``blank``, or ``best``: the teacher's best class of the frame; with ``head: attention``,
                whose tokens have no blank, it must be ``best``.
            alpha: weight of TCKD.
            beta: weight of NCKD.
        """

        target: Literal["blank", "best"] = "blank"
        alpha: float = Field(1.0, ge=0)
        beta: float = Field(1.0, ge=0)

        def model_post_init(self, context: object, /) -> None:
            if self.head != "ctc" and self.target == "blank":
                raise ValueError(f"target: blank is for head: ctc; with head: {self.head}, set target: best")

    def divergence(self, both: Compared) -> Tensor:
        """Both parts, weighted."""
        target_N = both.blank_N if self.config.target == "blank" else both.log_p_NK.argmax(-1)
        is_target_NK = torch.zeros_like(both.log_p_NK, dtype=torch.bool).scatter(-1, target_N[:, None], True)
        binary, others = zip(
            *(split_at(x_NK, is_target_NK) for x_NK in (both.log_p_NK, both.log_q_NK)), strict=True
        )
        tckd_N, nckd_N = kl(*binary), kl(*(x_NK.masked_fill(is_target_NK, 0.0) for x_NK in others))
        divergence_N: Tensor = self.config.alpha * tckd_N + self.config.beta * nckd_N
        return divergence_N


def split_at(log_p_NK: Tensor, is_target_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-posteriors of the target and of all others together (N, 2), and of the others alone (N, K)."""
    others_NK = log_p_NK.masked_fill(is_target_NK, -torch.inf)
    log_others_N1 = others_NK.logsumexp(-1, keepdim=True)
    log_target_N1 = log_p_NK.masked_fill(~is_target_NK, 0.0).sum(-1, keepdim=True)
    return torch.cat([log_target_N1, log_others_N1], -1), log_p_NK - log_others_N1


class StandardisedKl(PosteriorLoss):
    """``T^2 * sum over frames of KL(softmax(z(teacher) / T) || softmax(z(student) / T))``, z: z-score.

    Logits of each frame less their mean, divided by their deviation over the V classes (Sun 2024, arXiv
    2403.01427; deviation as in the authors' code): the student is to order the classes as the teacher does
    and need not reach the range of its logits. Log-posteriors serve as the teacher's logits: they differ by
    a constant per frame, which the z-score takes away.

    It needs all V classes. A class that the teacher rules out has a logit of -1e4, beside which all others
    are equal: not for such teachers.
    """

    name = "logit_std"
    all_classes = True

    class Config(FrameOptions):
        """Options of ``logit_std``.

        Args:
            temperature: T, above 0, of the z-scores; z-scores are about -2 to 2, with blanks up to the root
                of V, so that T = 1 is soft already.
        """

        temperature: float = Field(1.0, gt=0)

    def divergence(self, both: Compared) -> Tensor:
        """KL of the z-scores."""
        scores = (z_scores(x_NK) for x_NK in (both.log_p_NK, both.log_q_NK))
        return kl(*((z_NK / self.config.temperature).log_softmax(-1) for z_NK in scores))


def z_scores(logits_NK: Tensor) -> Tensor:
    """(N, K) of mean 0 and variance 1 per frame; 0 where all are equal."""
    centred_NK = logits_NK - logits_NK.mean(-1, keepdim=True)
    variance_N1 = centred_NK.square().sum(-1, keepdim=True) / max(1, logits_NK.shape[-1] - 1)
    return centred_NK * (variance_N1 + 1e-12).rsqrt()


class SoftmaxL2(PosteriorLoss):
    """``T^2 * sum over frames of sum over classes of (p - q)^2``, both softened by T.

    After TutorNet's softmax-level distillation (Yoon 2021, arXiv 2008.00671). At most 2 per frame, so that a
    frame on which the student's spike is elsewhere does not dominate; its gradient vanishes where the
    student is sure of something else.

    With top-k targets it is over the K kept classes and the rest, K + 1 classes.
    """

    name = "softmax_l2"

    class Config(TopKOptions):
        """Options of ``softmax_l2``."""

    def divergence(self, both: Compared) -> Tensor:
        """Squared distance of posteriors."""
        return (both.log_p_NK.exp() - both.log_q_NK.exp()).square().sum(-1)


class LogitL2(PosteriorLoss):
    """``sum over frames of mean over V classes of (z_p - z_q)^2``, z: logits less their mean over classes.

    A teacher's targets are log-posteriors, its logits but for a constant per frame, so that constant is taken
    from both. With the temperature going to infinity, ``kl`` tends to half of it (Hinton 2015, arXiv
    1503.02531, section 2.1).

    It needs all V classes. A class that the teacher rules out has a logit of -1e4: not for such teachers.
    """

    name = "logit_l2"
    all_classes = True

    class Config(FrameOptions):
        """Options of ``logit_l2``."""

    def divergence(self, both: Compared) -> Tensor:
        """Mean squared distance of centred logits."""
        difference_NV = both.log_p_NK - both.log_q_NK
        return (difference_NV - difference_NV.mean(-1, keepdim=True)).square().mean(-1)


class Dist(PosteriorLoss):
    """``T^2 * sum over frames of beta (1 - r(p_t, q_t)) + gamma * mean over classes of (1 - r(p_c, q_c))``.

    r is Pearson's correlation: of a frame's posteriors over the classes, and of a class's posteriors over
    the frames of an utterance (DIST, Huang 2022, arXiv 2205.10536). The student need only be in a linear
    relation to a teacher that is far stronger. The paper's second sum goes over a batch of images; ours over
    the frames of one utterance, so that an utterance's loss does not depend on its neighbours. A class
    that does not occur in an utterance adds a constant.

    It needs all V classes: one class over all frames is not among the kept ones of each.
    """

    name = "dist"
    all_classes = True

    class Config(SoftOptions):
        """Options of ``dist``.

        Args:
            beta: weight of the relation between classes.
            gamma: weight of the relation within a class.
        """

        beta: float = Field(1.0, ge=0)
        gamma: float = Field(1.0, ge=0)

    def divergence(self, both: Compared) -> Tensor:
        """Both relations; that within classes is the same for all frames of an utterance."""
        p_NV, q_NV = both.log_p_NK.exp(), both.log_q_NK.exp()
        number_N = both.rows_N.unique(return_inverse=True)[1]
        num_rows = int(number_N.max()) + 1 if len(number_N) else 0

        def over_frames(values_NV: Tensor) -> Tensor:
            return values_NV.new_zeros(num_rows, values_NV.shape[1]).index_add(0, number_N, values_NV)

        size_R1 = over_frames(torch.ones_like(p_NV[:, :1]))
        p_c_NV, q_c_NV = (x - (over_frames(x) / size_R1)[number_N] for x in (p_NV, q_NV))
        p_t_NV, q_t_NV = (x - x.mean(-1, keepdim=True) for x in (p_NV, q_NV))
        inter_N = 1 - _correlation(p_t_NV, q_t_NV, lambda x: x.sum(-1))
        intra_R = (1 - _correlation(p_c_NV, q_c_NV, over_frames)).mean(-1)
        divergence_N: Tensor = self.config.beta * inter_N + self.config.gamma * intra_R[number_N]
        return divergence_N


def _correlation(a_NV: Tensor, b_NV: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Pearson's r of centred values, summed by ``total``; about 0 where one of the two hardly varies."""
    # within the root, too: that of 0 has no gradient
    deviations = (total(a_NV.square()) * total(b_NV.square()) + TINY_DEVIATION**2).sqrt()
    return total(a_NV * b_NV) / (deviations + TINY_DEVIATION)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make them known."""
    for cls in (SkewKl, JensenShannon, DecoupledKl, StandardisedKl, SoftmaxL2, LogitL2, Dist):
        register(cls.name, cls)
