"""While a student learns: on what share of frames its best token is its teacher's.

The loss falls for many reasons; this says whether the student comes to decide as the teacher does
(fidelity; Stanton et al. 2021, arXiv 2106.05945). It goes into ``log.jsonl`` as
``agreement/<teacher>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import ModelOutput, Posteriors, Targets

if TYPE_CHECKING:
    from torch import Tensor


@hookimpl
def train_metrics(student: ModelOutput, teacher: Mapping[str, Targets]) -> dict[str, float]:
    """``agreement/<teacher>``, 0 to 1, for every teacher that gave frame posteriors."""
    found = {}
    for name, targets in teacher.items():
        for key, item in targets.items.items():
            kind, _, head = key.partition(":")
            if kind == "frame_logits" and isinstance(item, Posteriors) and head in student.logits:
                found[f"agreement/{name}"] = _agreement(student.logits[head], item)
    return found


def _agreement(logits_BTV: Tensor, target: Posteriors) -> float:
    best_BT = target.log_probs_BTK.argmax(-1)
    if target.indices_BTK is not None:
        best_BT = target.indices_BTK.gather(-1, best_BT[..., None])[..., 0]
    mask_BT = frame_mask(target.lens_B, best_BT.shape[1])
    same_BT = logits_BTV[: len(best_BT), : best_BT.shape[1]].argmax(-1) == best_BT
    return float((same_BT & mask_BT).sum() / torch.clamp(mask_BT.sum(), min=1))
