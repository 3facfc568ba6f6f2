"""KL between a teacher's and the student's posteriors: CTC's by frames, an attention decoder's by tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kdrecipe import hookimpl

from .posteriors import Compared, PosteriorLoss, TopKOptions, kl


class KlLoss(PosteriorLoss):
    """``T^2 * sum over frames (or tokens) of KL(teacher || student)``, both softened by the temperature T.

    The factor T^2 keeps the size of the gradient while T changes (Hinton 2015, arXiv 1503.02531). With
    ``head: ctc`` it compares frames, with ``head: attention`` the tokens of the transcript and the end of the
    sentence, each given those before it; on unlabelled utterances those of the teacher's own hypothesis.

    CTC posteriors are blank on most frames; ``blank`` says what to do about them (Hilmes 2025, arXiv
    2506.01503, compares elimination and symmetric selection; the weights are TutorNet's, Yoon 2021,
    arXiv 2008.00671).

    A class that the teacher rules out (-inf) weighs nothing; with ``direction: reverse``, where the
    KL would be infinite, it counts as a log-posterior of -1e4.

    With top-k targets, the K kept classes and the mass of all others together are K + 1 classes,
    in both teacher and student: the loss is 0 where they agree, and the full KL for K = V. Scaling the
    K kept ones up to 1 would make the student over-confident (Anshumann 2025, arXiv 2503.16870).

    Count: the frames or tokens used. Metric ``agree``: those whose best class is the teacher's.

    Raises:
        RecipeError: teacher and student have different tokens, or the student lacks the head.
        DataError: their frame counts differ.
    """

    name = "kl"

    class Config(TopKOptions):
        """Options of ``kl``.

        Args:
            direction: ``forward`` is KL(teacher || student), ``reverse`` KL(student || teacher).
        """

        direction: Literal["forward", "reverse"] = "forward"

    def divergence(self, both: Compared) -> Tensor:
        """KL in the direction that is configured."""
        if self.config.direction == "reverse":
            return kl(both.log_q_NK, both.log_p_NK)
        return kl(both.log_p_NK, both.log_q_NK)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``kl`` known."""
    register("kl", KlLoss)
