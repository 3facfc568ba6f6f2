"""The greedy path of a head of a bundle's model, and the log-posteriors along it.

Shapes: T frames, U tokens, V vocabulary, M steps of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import BLANK_ID, SOS_EOS_ID, UNK_ID, ModelOutput

STEPS = {"ctc": "frame", "rnnt": "frame", "attention": "token"}
"""What one step of a head's path is."""


@dataclass
class Reference:
    """One utterance.

    Args:
        path: see :meth:`kdrecipe.interfaces.Runner.log_probs_along`.
        log_probs_MV: log-posteriors at each step of the path.
        tokens: of greedy search.
    """

    path: list[int]
    log_probs_MV: np.ndarray
    tokens: list[int]


@torch.no_grad()
def reference(model: Any, head: str, features_TF: np.ndarray, path: Sequence[int] | None = None) -> Reference:
    """The result of ``model`` on one utterance, by ``head``.

    Args:
        model: with the head.
        head: its name.
        features_TF: log-mel features.
        path: of another model, to have the log-posteriors along; None: the model's own.

    Raises:
        KdrecipeError: a head other than those in :data:`STEPS`.
    """
    if head not in PATHS:
        raise KdrecipeError(
            f"the parity gate knows no path of the head {head!r}", remedy=f"it knows {', '.join(PATHS)}"
        )
    out = model.encode(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
    (tokens,) = model.greedy(out, head)
    taken, log_probs_MV = PATHS[head](model.heads[head], out, tokens, path)
    return Reference(taken, log_probs_MV.numpy(), tokens)


@torch.no_grad()
def along(model: Any, head: str, features_TF: np.ndarray, path: Sequence[int]) -> Reference:
    """As :func:`reference` along ``path``, whose tokens are those of the result: nothing is searched."""
    out = model.encode(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
    taken, log_probs_MV = PATHS[head](model.heads[head], out, [], path)
    return Reference(taken, log_probs_MV.numpy(), list(path))


Path = Sequence[int] | None  # None: the own one


def _ctc(head: Any, out: ModelOutput, tokens: list[int], path: Path) -> tuple[list[int], Tensor]:
    log_probs_TV = head(out.hidden_BTD, out.lens_B)[0, : int(out.lens_B[0])].log_softmax(-1)
    return log_probs_TV.argmax(-1).tolist(), log_probs_TV


def _attention(head: Any, out: ModelOutput, tokens: list[int], path: Path) -> tuple[list[int], Tensor]:
    memory, state = head.memory(out.hidden_BTD, out.lens_B), head.start(1)
    tokens = tokens if path is None else list(path)
    steps = []
    for token in [SOS_EOS_ID, *tokens]:
        log_probs_NV, state = head.step(torch.tensor([token]), state, memory)
        steps.append(log_probs_NV[0])
    return tokens, torch.stack(steps)


def _rnnt(head: Any, out: ModelOutput, tokens: list[int], path: Path) -> tuple[list[int], Tensor]:
    encoder_TJ = head.encode(out.hidden_BTD)[0, : int(out.lens_B[0])]
    state = head.start(1)
    side_NJ = head.predict(state)
    taken, steps = [], []
    for frame, encoder_J in enumerate(encoder_TJ):
        log_probs_V = head.join(encoder_J[None], side_NJ)[0].log_softmax(-1)
        label = int(log_probs_V.argmax()) if path is None else path[frame]
        steps.append(log_probs_V)
        taken.append(BLANK_ID if label == UNK_ID else label)  # as sherpa-onnx does
        if taken[-1] != BLANK_ID:
            state = head.advance(state, torch.tensor([label]))
            side_NJ = head.predict(state)
    return taken, torch.stack(steps) if steps else torch.zeros(0, head.vocab_size)


PATHS: dict[str, Callable[[Any, ModelOutput, list[int], Path], tuple[list[int], Tensor]]] = {
    "ctc": _ctc,
    "attention": _attention,
    "rnnt": _rnnt,
}
