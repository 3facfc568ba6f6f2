"""CTC prefix beam search (Hannun et al. 2014): the most probable text, summed over its alignments.

The search is :func:`kdrecipe.lattice.ctc.prefix_beam_search`.

A language model comes in by shallow fusion: a text of U tokens has the score
ln p(text | audio) + lm_weight * ln p_LM(text, its end) + length_bonus * U, and prefixes compete by
the same sum without the end.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import BLANK_ID, Hypothesis, LanguageModel, ModelOutput, Options, TokenTable
from kdrecipe.lattice.ctc import Prefix, prefix_beam_search

from .fusion import Fusion


class CtcPrefixBeam:
    """Prefix beam search on the ``ctc`` head.

    Args:
        tokens: of the bundle.
        frame_shift_s: seconds per encoder frame.
        lm: a language model of the tokens, where ``lm_weight`` is above 0.

    Raises:
        RecipeError: there is a weight and no language model.
    """

    head = "ctc"
    tiny_options: ClassVar[dict[str, int]] = {"beam": 2}

    class Config(Options):
        """Options.

        Args:
            beam: prefixes kept after every frame.
            num_tokens_per_frame: tokens tried per frame, the most probable ones.
            lm_weight: factor on the language model's log-probabilities.
            length_bonus: added per token, against a language model's liking for short texts.
        """

        beam: int = Field(default=8, ge=1)
        num_tokens_per_frame: int = Field(default=8, ge=1)
        lm_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
        length_bonus: float = Field(default=0.0, allow_inf_nan=False)

    def __init__(
        self, config: Config, tokens: TokenTable, frame_shift_s: float, lm: LanguageModel | None = None
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s
        self.fusion = Fusion.of("ctc_prefix_beam", config, lm)

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is the text's, fusion included."""
        log_probs_BTV = out.logits[self.head].float().log_softmax(-1).cpu().numpy().astype(np.float64)
        results = []
        for log_probs_TV, length in zip(log_probs_BTV, out.lens_B.tolist(), strict=True):
            valid_TV = log_probs_TV[:length]
            beam, num_tokens = self.config.beam, self.config.num_tokens_per_frame
            ids, score = prefix_beam_search(valid_TV, beam, num_tokens, self.fusion)[0]
            times_s = [frame * self.frame_shift_s for frame in align(valid_TV, ids)]
            results.append(Hypothesis(self.tokens.decode(ids), list(ids), times_s, score))
        return results


def align(log_probs_TV: np.ndarray, ids: Prefix) -> list[int]:
    """The frame at which each token starts in the most probable alignment (Viterbi).

    Args:
        log_probs_TV: log-posteriors, at least as many frames as ``ids`` and its repeats need.
        ids: token ids without blanks.
    """
    if not ids:
        return []
    # states: blank, token 1, blank, token 2, ..., blank
    states = np.full(2 * len(ids) + 1, BLANK_ID)
    states[1::2] = ids
    may_skip = np.zeros(len(states), dtype=bool)  # from the token before, over the blank between
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    scores = np.full(len(states), -inf)
    scores[:2] = log_probs_TV[0, states[:2]]
    steps_TS = np.zeros((len(log_probs_TV), len(states)), dtype=np.int64)  # states moved, 0 to 2
    for frame in range(1, len(log_probs_TV)):
        candidates = np.full((3, len(states)), -inf)
        candidates[0] = scores
        candidates[1, 1:] = scores[:-1]
        candidates[2, 2:] = np.where(may_skip[2:], scores[:-2], -inf)
        steps_TS[frame] = candidates.argmax(0)
        scores = candidates.max(0) + log_probs_TV[frame, states]
    state = len(states) - 1 if scores[-1] > scores[-2] else len(states) - 2
    starts = [0] * len(ids)
    for frame in range(len(log_probs_TV) - 1, -1, -1):
        if state % 2:
            starts[state // 2] = frame
        state -= int(steps_TS[frame, state])
    return starts


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("ctc_prefix_beam", CtcPrefixBeam)
