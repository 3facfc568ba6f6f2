"""A flat start for CTC: for some steps, each frame of the speech is told which token it might be.

Left alone, CTC first learns to emit blanks, and stays there until it finds out by chance where tokens
lie: its plateau. Kaldi's monophone models begin with alignments that divide an utterance evenly among its
symbols ("align-equal"); most of these labels are wrong, but they are right more often than not in the rough,
and that is enough to begin with.

B utterances, T frames, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrecipe.frames import full_precision
from kdrecipe.interfaces import BLANK_ID, Batch, LossOutput, ModelOutput, Options, Targets, TargetSpec
from kdrecipe.model.heads.ctc import CtcLoss
from kdrecipe.train.objective import Objective, Term

NAME = "flat_start"
_LEVEL = 0.4  # of the way from the 10th to the 90th percentile of an utterance's log energy: speech begins


class FlatStart:
    """Cross-entropy between the CTC posteriors and an even division of the speech among its tokens.

    Speech is what lies between the first and the last frame whose mean log-mel energy is above a level
    of its utterance's own; the frames outside are blank.

    Count: frames of labelled utterances that have a text and enough frames for it.
    """

    Config: ClassVar[type[Options]] = Options
    supervised = True

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Nothing from a teacher."""
        return []

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over frames, in nats."""
        logits_BTV = full_precision(out.logits["ctc"])
        goal_BT = even_alignment(batch, out.lens_B, logits_BTV.shape[1])
        total = F.cross_entropy(logits_BTV.flatten(0, 1), goal_BT.flatten(), ignore_index=-1, reduction="sum")
        return LossOutput(total, (goal_BT >= 0).sum())


def even_alignment(batch: Batch, lens_B: Tensor, num_frames: int) -> Tensor:
    """(B, T) the token of each of a model's frames, blank outside the speech; -1 where nothing is said of it.

    Args:
        batch: features and tokens.
        lens_B: the model's frames of each utterance.
        num_frames: T.
    """
    energy_BT = batch.features_BTF.float().mean(-1).cpu()
    goal_BT = torch.full((len(batch), num_frames), -1, dtype=torch.int64)
    rows = zip(batch.lens_B.tolist(), lens_B.tolist(), batch.token_lens_B.tolist(), strict=True)
    for i, (num_features, length, num_tokens) in enumerate(rows):
        if num_tokens == 0 or not batch.labelled_B[i]:
            continue
        first, end = _speech(energy_BT[i, :num_features])
        first, end = first * length // num_features, -(-end * length // num_features)
        if end - first < num_tokens:
            first, end = 0, length
        if length < num_tokens:
            continue
        places = torch.arange(end - first) * num_tokens // (end - first)
        goal_BT[i, :length] = BLANK_ID
        goal_BT[i, first:end] = batch.tokens_BU[i].cpu()[places]
    return goal_BT.to(batch.tokens_BU.device)


def _speech(energy_T: Tensor) -> tuple[int, int]:
    """First frame and end of the speech."""
    low, high = torch.quantile(energy_T, torch.tensor([0.1, 0.9])).tolist()
    loud = (energy_T > low + _LEVEL * (high - low)).nonzero().flatten().tolist()
    return (loud[0], loud[-1] + 1) if loud else (0, len(energy_T))


def with_flat_start(objective: Objective, num_steps: int) -> Objective:
    """The objective with a flat start that fades over so many steps, if it has a CTC loss to start."""
    weight = sum(term.weight for term in objective.terms if isinstance(term.loss, CtcLoss))
    if num_steps == 0 or weight == 0:
        return objective
    return Objective([*objective.terms, Term(NAME, weight, FlatStart(), fade_steps=num_steps)])
