"""CTC prefix beam search (Hannun et al. 2014): the most probable text, summed over its alignments.

Per prefix two log-probabilities are kept: of all paths that end in a blank, and of all that end in
the prefix's last token. Pruning to the best tokens of a frame and the best prefixes makes the
score a lower bound of the text's log-probability; with neither it is exact.

A language model comes in by shallow fusion: a text of U tokens has the score
ln p(text | audio) + lm_weight * ln p_LM(text, its end) + length_bonus * U, and prefixes compete by
the same sum without the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from math import exp, inf, log1p
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import BLANK_ID, Hypothesis, LanguageModel, ModelOutput, Options, TokenTable

from .fusion import Fusion

Prefix = tuple[int, ...]


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


class _Node:
    """A prefix, in the tree of all that were tried.

    ``blank`` and ``token`` are the log-probabilities of its paths that end in a blank, and of those
    that end in its last token; ``next_blank`` and ``next_token`` the same one frame later. ``frame``
    is the last frame that reached it.
    """

    __slots__ = (
        "blank", "bonus", "children", "frame", "last", "next_blank", "next_token", "parent", "score",
        "state", "token",
    )  # fmt: skip

    def __init__(self, parent: _Node | None, last: int, bonus: float, state: Any) -> None:
        self.parent = parent
        self.last = last
        self.bonus = bonus  # all that fusion adds
        self.state = state
        self.children: dict[int, _Node] = {}
        self.frame = -1
        self.blank = self.token = self.next_blank = self.next_token = self.score = -inf

    def child(self, token: int, fusion: Fusion) -> _Node:
        """The prefix with ``token`` after it; the language model is asked once for each."""
        found = self.children.get(token)
        if found is None:
            bonus, state = fusion.extend(self.state, token)
            found = self.children[token] = _Node(self, token, self.bonus + bonus, state)
        return found

    def reach(self, frame: int, reached: list[_Node]) -> None:
        """Join the prefixes that ``frame`` leads to."""
        if self.frame != frame:
            self.frame = frame
            self.next_blank = self.next_token = -inf
            reached.append(self)

    def advance(self) -> None:
        """One frame later."""
        self.blank, self.token = self.next_blank, self.next_token
        self.score = log_add(self.blank, self.token) + self.bonus

    def prefix(self) -> Prefix:
        """Its tokens."""
        node, tokens = self, []
        while node.parent is not None:
            tokens.append(node.last)
            node = node.parent
        return tuple(reversed(tokens))


def prefix_beam_search(
    log_probs_TV: np.ndarray, beam: int, num_tokens_per_frame: int, fusion: Fusion | None = None
) -> list[tuple[Prefix, float]]:
    """The best texts of one utterance with their scores, best first.

    Args:
        log_probs_TV: log-posteriors, without padding.
        beam: prefixes kept per frame (at most so many are returned).
        num_tokens_per_frame: tokens tried per frame; the blank is always tried.
        fusion: what a text scores besides its log-probability; None: nothing.
    """
    fusion = fusion or Fusion()
    root = _Node(None, BLANK_ID, 0.0, fusion.start())
    root.next_blank = 0.0
    root.advance()
    kept = [root]
    for frame, (tried, blank) in enumerate(_pruned_frames(log_probs_TV, num_tokens_per_frame)):
        reached: list[_Node] = []
        for node in kept:
            total = log_add(node.blank, node.token)
            node.reach(frame, reached)
            node.next_blank = total + blank
            for token, log_prob in tried:
                longer = node.child(token, fusion)
                longer.reach(frame, reached)
                if token == node.last:  # without a blank between them the two are one
                    node.next_token = log_add(node.next_token, node.token + log_prob)
                    longer.next_token = log_add(longer.next_token, node.blank + log_prob)
                else:
                    longer.next_token = log_add(longer.next_token, total + log_prob)
        for node in reached:
            node.advance()
        kept = heapq.nlargest(beam, reached, key=attrgetter("score"))
    scored = [(node.prefix(), node.score + fusion.end(node.state)) for node in kept if node.score > -inf]
    return sorted(scored, key=lambda item: -item[1])


def _pruned_frames(
    log_probs_TV: np.ndarray, num_tokens: int
) -> Iterator[tuple[list[tuple[int, float]], float]]:
    """Per frame: the best tokens but the blank, each with its log-probability, and the blank's."""
    if len(log_probs_TV) == 0:
        return
    tokens_TV = log_probs_TV.copy()
    tokens_TV[:, BLANK_ID] = -inf
    keep = min(num_tokens, tokens_TV.shape[1] - 1)
    best_TK = np.argpartition(-tokens_TV, keep - 1, axis=1)[:, :keep]
    best_log_probs_TK = np.take_along_axis(tokens_TV, best_TK, axis=1)
    for frame, blank in enumerate(log_probs_TV[:, BLANK_ID].tolist()):
        yield list(zip(best_TK[frame].tolist(), best_log_probs_TK[frame].tolist(), strict=True)), blank


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


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); numpy's is ten times slower on two floats."""
    if a < b:
        a, b = b, a
    return a if b == -inf else a + log1p(exp(b - a))


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("ctc_prefix_beam", CtcPrefixBeam)
