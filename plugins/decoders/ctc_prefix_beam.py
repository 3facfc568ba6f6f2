"""CTC prefix beam search (Hannun et al. 2014): the most probable text, summed over its alignments.

Per prefix two log-probabilities are kept: of all paths that end in a blank, and of all that end in
the prefix's last token. Pruning to the best tokens of a frame and the best prefixes makes the
score a lower bound of the text's log-probability; with neither it is exact.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from math import exp, inf, log1p
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import BLANK_ID, Hypothesis, ModelOutput, Options, TokenTable

Prefix = tuple[int, ...]


class CtcPrefixBeam:
    """Prefix beam search on the ``ctc`` head. Args: tokens of the bundle; seconds per frame."""

    head = "ctc"

    class Config(Options):
        """Options.

        Args:
            beam: prefixes kept after every frame.
            num_tokens_per_frame: tokens tried per frame, the most probable ones.
        """

        beam: int = Field(default=8, ge=1)
        num_tokens_per_frame: int = Field(default=8, ge=1)

    def __init__(self, config: Config, tokens: TokenTable, frame_shift_s: float) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is the log-probability of its text."""
        log_probs_BTV = out.logits[self.head].float().log_softmax(-1).cpu().numpy().astype(np.float64)
        results = []
        for log_probs_TV, length in zip(log_probs_BTV, out.lens_B.tolist(), strict=True):
            valid_TV = log_probs_TV[:length]
            ids, score = prefix_beam_search(valid_TV, self.config.beam, self.config.num_tokens_per_frame)[0]
            times_s = [frame * self.frame_shift_s for frame in align(valid_TV, ids)]
            results.append(Hypothesis(self.tokens.decode(ids), list(ids), times_s, score))
        return results


class _Ends(NamedTuple):
    """Log-probability of a prefix, by what its paths end in."""

    blank: float
    token: float


def prefix_beam_search(
    log_probs_TV: np.ndarray, beam: int, num_tokens_per_frame: int
) -> list[tuple[Prefix, float]]:
    """The best texts of one utterance with their log-probabilities, best first.

    Args:
        log_probs_TV: log-posteriors, without padding.
        beam: prefixes kept per frame (at most so many are returned).
        num_tokens_per_frame: tokens tried per frame; the blank is always tried.
    """
    hypotheses: list[tuple[Prefix, _Ends]] = [((), _Ends(0.0, -inf))]
    for tokens, log_probs, blank in _pruned_frames(log_probs_TV, num_tokens_per_frame):
        by_token = dict(zip(tokens, log_probs, strict=True))
        ends_blank: dict[Prefix, float] = defaultdict(lambda: -inf)
        ends_token: dict[Prefix, float] = defaultdict(lambda: -inf)
        for prefix, ends in hypotheses:
            total = _log_add(ends.blank, ends.token)
            ends_blank[prefix] = _log_add(ends_blank[prefix], total + blank)
            last = prefix[-1] if prefix else BLANK_ID
            for token, log_prob in by_token.items():
                longer = (*prefix, token)
                if token == last:  # without a blank between them the two are one
                    ends_token[prefix] = _log_add(ends_token[prefix], ends.token + log_prob)
                    ends_token[longer] = _log_add(ends_token[longer], ends.blank + log_prob)
                else:
                    ends_token[longer] = _log_add(ends_token[longer], total + log_prob)
        merged = {p: _Ends(ends_blank[p], ends_token[p]) for p in (ends_blank | ends_token)}
        hypotheses = heapq.nlargest(beam, merged.items(), key=lambda item: _log_add(*item[1]))
    scored = [(prefix, _log_add(*ends)) for prefix, ends in hypotheses]
    return sorted((s for s in scored if s[1] > -inf), key=lambda item: -item[1])


def _pruned_frames(log_probs_TV: np.ndarray, num_tokens: int) -> list[tuple[list[int], list[float], float]]:
    """Per frame: the best non-blank tokens, their log-probabilities, and the blank's."""
    if len(log_probs_TV) == 0:
        return []
    tokens_TV = log_probs_TV.copy()
    tokens_TV[:, BLANK_ID] = -inf
    keep = min(num_tokens, tokens_TV.shape[1] - 1)
    best_TK = np.argpartition(-tokens_TV, keep - 1, axis=1)[:, :keep]
    best_log_probs_TK = np.take_along_axis(tokens_TV, best_TK, axis=1)
    blank_T = log_probs_TV[:, BLANK_ID].tolist()
    return list(zip(best_TK.tolist(), best_log_probs_TK.tolist(), blank_T, strict=True))


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


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); numpy's is ten times slower on two floats."""
    if a < b:
        a, b = b, a
    return a if b == -inf else a + log1p(exp(b - a))


@hookimpl
def register_decoders(register):
    register("ctc_prefix_beam", CtcPrefixBeam)
