"""CTC prefix beam search (Hannun et al. 2014): the most probable texts, each summed over its alignments.

Per prefix two log-probabilities are kept: of all paths that end in a blank, and of all that end in
the prefix's last token. Pruning to the best tokens of a frame and the best prefixes makes the
score a lower bound of the text's log-probability; with neither it is exact.

T frames, V vocabulary, K tokens tried per frame.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from math import exp, inf, log1p
from operator import attrgetter
from typing import Any, Protocol

import numpy as np

from kdrecipe.interfaces import BLANK_ID

Prefix = tuple[int, ...]


class Extra(Protocol):
    """What a text scores besides what CTC says of it, such as a language model's log-probability."""

    def start(self) -> Any:
        """The state before the first token."""

    def extend(self, state: Any, token: int) -> tuple[float, Any]:
        """What ``token`` adds, and the state after it."""

    def end(self, state: Any) -> float:
        """What the end of the text adds."""


class _Nothing:
    def start(self) -> None:
        return None

    def extend(self, state: None, token: int) -> tuple[float, None]:
        return 0.0, None

    def end(self, state: None) -> float:
        return 0.0


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
        self.bonus = bonus  # all that is extra
        self.state = state
        self.children: dict[int, _Node] = {}
        self.frame = -1
        self.blank = self.token = self.next_blank = self.next_token = self.score = -inf

    def child(self, token: int, extra: Extra) -> _Node:
        """The prefix with ``token`` after it; the language model is asked once for each."""
        found = self.children.get(token)
        if found is None:
            bonus, state = extra.extend(self.state, token)
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
    log_probs_TV: np.ndarray, beam: int, num_tokens_per_frame: int, extra: Extra | None = None
) -> list[tuple[Prefix, float]]:
    """The best texts of one utterance with their scores, best first.

    Args:
        log_probs_TV: log-posteriors, without padding.
        beam: prefixes kept per frame (at most so many are returned).
        num_tokens_per_frame: tokens tried per frame; the blank is always tried.
        extra: what a text scores besides its log-probability; None: nothing.
    """
    extra = extra or _Nothing()
    root = _Node(None, BLANK_ID, 0.0, extra.start())
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
                longer = node.child(token, extra)
                longer.reach(frame, reached)
                if token == node.last:  # without a blank between them the two are one
                    node.next_token = log_add(node.next_token, node.token + log_prob)
                    longer.next_token = log_add(longer.next_token, node.blank + log_prob)
                else:
                    longer.next_token = log_add(longer.next_token, total + log_prob)
        for node in reached:
            node.advance()
        kept = heapq.nlargest(beam, reached, key=attrgetter("score"))
    scored = [(node.prefix(), node.score + extra.end(node.state)) for node in kept if node.score > -inf]
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


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); numpy's is ten times slower on two floats."""
    if a < b:
        a, b = b, a
    return a if b == -inf else a + log1p(exp(b - a))
