"""What CTC says of a text's beginning: for searches that build texts token by token.

The probability of a prefix is that of all texts which begin with it, summed over all their
alignments (Graves 2012, section 7.5.2; Watanabe 2017, algorithm 2). Two log-probabilities are kept
per prefix and frame: of all paths up to this frame that spell the prefix and end in its last token,
and of those that end in a blank.

K prefixes, C candidates for the next token, T frames, V vocabulary. Index t of the forward
variables is after t frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdrecipe.interfaces import BLANK_ID

FLOOR = -1e4  # of log-posteriors: differences of their sums must stay defined


@dataclass
class CtcPrefixes:
    """K prefixes: their last tokens (BLANK_ID: none yet) and forward variables.

    Args:
        last_K: int64.
        token_KT: (K, T + 1) log-probability of the paths that end in the last token.
        blank_KT: (K, T + 1) log-probability of the paths that end in a blank.
    """

    last_K: np.ndarray
    token_KT: np.ndarray
    blank_KT: np.ndarray


class CtcPrefixScorer:
    """Scores of prefixes of one utterance.

    Args:
        log_probs_TV: log-posteriors, without padding.
    """

    def __init__(self, log_probs_TV: np.ndarray) -> None:
        self.log_probs_VT = np.maximum(log_probs_TV.astype(np.float64), FLOOR).T.copy()
        self.blank_T = self.log_probs_VT[BLANK_ID]

    def start(self) -> CtcPrefixes:
        """The empty prefix, which every text begins with."""
        blank_KT = np.concatenate([[0.0], self.blank_T.cumsum()])[None]
        return CtcPrefixes(np.array([BLANK_ID]), np.full_like(blank_KT, -np.inf), blank_KT)

    def whole(self, prefixes: CtcPrefixes) -> np.ndarray:
        """(K,) log-probability that the text is the prefix and no more."""
        whole_K: np.ndarray = np.logaddexp(prefixes.token_KT[:, -1], prefixes.blank_KT[:, -1])
        return whole_K

    def longer(self, prefixes: CtcPrefixes, tokens_KC: np.ndarray) -> np.ndarray:
        """(K, C) log-probability that the text begins with the prefix and then the token."""
        before_KCT = self._before(prefixes, tokens_KC)
        scores_KCT = before_KCT + self.log_probs_VT[tokens_KC]
        most_KC1 = scores_KCT.max(-1, keepdims=True).clip(min=-1e30)
        with np.errstate(divide="ignore"):  # log(0) where there are too few frames
            log_sums_KC: np.ndarray = np.log(np.exp(scores_KCT - most_KC1).sum(-1)) + most_KC1[..., 0]
        return log_sums_KC

    def extend(self, prefixes: CtcPrefixes, rows_N: np.ndarray, tokens_N: np.ndarray) -> CtcPrefixes:
        """N new prefixes: the ``rows_N``-th ones, each with a token more."""
        picked = CtcPrefixes(*(x[rows_N] for x in (prefixes.last_K, prefixes.token_KT, prefixes.blank_KT)))
        before_NT = self._before(picked, tokens_N[:, None])[:, 0]
        token_NT = _paths(before_NT, self.log_probs_VT[tokens_N])
        return CtcPrefixes(tokens_N, token_NT, _paths(token_NT[:, :-1], self.blank_T))

    def _before(self, prefixes: CtcPrefixes, tokens_KC: np.ndarray) -> np.ndarray:
        """(K, C, T) log-probability that a path is where the token may begin, before each frame."""
        blank_KT, token_KT = prefixes.blank_KT[:, None, :-1], prefixes.token_KT[:, None, :-1]
        repeated_KC1 = (tokens_KC == prefixes.last_K[:, None])[..., None]
        # the same token twice needs a blank between
        return np.where(repeated_KC1, blank_KT, np.logaddexp(blank_KT, token_KT))


def _paths(enter_NT: np.ndarray, stay_NT: np.ndarray) -> np.ndarray:
    """(N, T + 1) log-probability of being in a state after each frame.

    It is r[t] = (r[t - 1] + enter[t - 1]) * stay[t], r[0] = 0, in logarithms; divided by the product
    of ``stay`` up to t, it is a sum, which needs no loop over frames.
    """
    product_NT = stay_NT.cumsum(-1)
    sums_NT = np.logaddexp.accumulate(enter_NT - (product_NT - stay_NT), axis=-1)
    nowhere_N1 = np.full((len(sums_NT), 1), -np.inf)
    return np.concatenate([nowhere_N1, sums_NT + product_NT], axis=1)
