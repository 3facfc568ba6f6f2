"""Joint CTC/attention beam search in one pass (Watanabe 2017, Hori 2017), with a language model.

A text y with U tokens scores

    (1 - ctc_weight) log p_att(y) + ctc_weight log p_ctc(y) + lm_weight log p_lm(y) + length_bonus U

Texts grow by a token per step. A text that is not yet complete scores with CTC's probability of its
prefix. If the beam drops nothing, the search is exact.

K hypotheses, C candidates for the next token, T frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import (
    BLANK_ID,
    SOS_EOS_ID,
    Hypothesis,
    LanguageModel,
    ModelOutput,
    Options,
    TokenTable,
)

from .ctc_prefix_beam import align
from .ctc_prefix_scores import CtcPrefixes, CtcPrefixScorer
from .fusion import Fusion

CANDIDATES_PER_BEAM = 2  # tokens that CTC and language model score per hypothesis, in beams


class AttentionBeam:
    """Beam search on the ``attention`` head, with ``ctc`` beside it.

    Args:
        config: its options.
        tokens: of the bundle.
        frame_shift_s: seconds per encoder frame.
        lm: over the same tokens; None where ``lm_weight`` is 0.

    Raises:
        RecipeError: ``lm_weight`` without a language model.
    """

    head = "attention"
    tiny_options: ClassVar[dict[str, float]] = {
        "beam": 2,
        "max_len_ratio": 0.1,
    }  # untrained, a search would not end by itself

    class Config(Options):
        """Options.

        Args:
            beam: hypotheses kept after every token.
            ctc_weight: share of CTC against attention, in [0, 1); above 0 the model needs ``ctc``.
            lm_weight: of the language model's log-probability.
            length_bonus: added per token.
            max_len_ratio: tokens per frame, at most.
        """

        beam: int = Field(default=8, ge=1)
        ctc_weight: float = Field(default=0.3, ge=0.0, lt=1.0)
        lm_weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
        length_bonus: float = Field(default=0.0, allow_inf_nan=False)
        max_len_ratio: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)

    @staticmethod
    def beside(config: Config) -> list[str]:
        """CTC, if it has a weight."""
        return ["ctc"] if config.ctc_weight else []

    def __init__(
        self, config: Config, tokens: TokenTable, frame_shift_s: float, lm: LanguageModel | None = None
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s
        self.fusion = Fusion.of("attention_beam", config, lm)

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance, with its score as above; token starts are those of CTC's alignment.

        Raises:
            RecipeError: ``ctc_weight`` is above 0 and the model has no head ``ctc``.
        """
        head: Any = model.get_submodule(f"heads.{self.head}")
        ctc_BTV = self._ctc_log_probs(model, out)
        results = []
        for row, length in enumerate(out.lens_B.tolist()):
            if length == 0:
                results.append(Hypothesis("", score=0.0))
                continue
            memory = head.memory(out.hidden_BTD[row : row + 1, :length], out.lens_B[row : row + 1])
            ctc_TV = None if ctc_BTV is None else ctc_BTV[row, :length]
            search = _Search(self.config, head, memory, ctc_TV, self.fusion)
            ids, score = search.best_text(max(1, int(self.config.max_len_ratio * length)))
            frames = [] if ctc_TV is None else align(ctc_TV, tuple(ids))
            times_s = [frame * self.frame_shift_s for frame in frames]
            results.append(Hypothesis(self.tokens.decode(ids), ids, times_s, score))
        return results

    def _ctc_log_probs(self, model: nn.Module, out: ModelOutput) -> np.ndarray | None:
        if self.config.ctc_weight == 0:
            return None
        logits_BTV = out.logits.get("ctc")
        if logits_BTV is None:
            heads: Any = model.heads
            if "ctc" not in heads:
                weight = self.config.ctc_weight
                raise RecipeError(
                    f"attention_beam has ctc_weight {weight:g}, and the model has no head 'ctc'",
                    where="decode",
                    remedy="set ctc_weight: 0, or train the model with the head ctc: {} and the loss ctc",
                )
            logits_BTV = heads["ctc"](out.hidden_BTD, out.lens_B)
        log_probs_BTV: np.ndarray = logits_BTV.double().log_softmax(-1).cpu().numpy()
        return log_probs_BTV


@dataclass
class _Beam:
    """K texts, their scores without CTC, and what each model knows after them."""

    texts: list[list[int]]
    base_K: np.ndarray
    attention: Any  # before the last token
    ctc: CtcPrefixes | None
    lm: list[Any]


@dataclass
class _Candidates:
    """Each text with one token more, or complete.

    Args:
        tokens_KC: the tokens.
        base_KC: scores without CTC.
        total_KC: scores.
        ends_K: scores of the complete texts.
        lm: (K, C) states of the language model.
    """

    tokens_KC: np.ndarray
    base_KC: np.ndarray
    total_KC: np.ndarray
    ends_K: np.ndarray
    lm: list[list[Any]]


class _Search:
    """The search on one utterance, which ``memory`` and ``ctc_TV`` are of."""

    def __init__(
        self,
        config: AttentionBeam.Config,
        head: Any,
        memory: Any,
        ctc_TV: np.ndarray | None,
        fusion: Fusion,
    ) -> None:
        self.config = config
        self.head = head
        self.memory = memory
        self.ctc = None if ctc_TV is None else CtcPrefixScorer(ctc_TV)
        self.fusion = fusion

    def best_text(self, max_len: int) -> tuple[list[int], float]:
        """The best text of at most ``max_len`` tokens that was found, and its score.

        Only the bonus makes a score grow with the text. So a text that can't beat the best complete text,
        even with all tokens that it may still get, is dropped; the search ends when nothing is left.
        """
        beam = self._start()
        best: tuple[list[int], float] = [], -inf
        for tokens_left in range(max_len, -1, -1):
            found = self._grow(beam)
            if tokens_left == 0:
                found.total_KC.fill(-inf)
            scores_KC = np.concatenate([found.total_KC, found.ends_K[:, None]], axis=1)
            picked = np.argsort(-scores_KC, axis=None, kind="stable")[: self.config.beam]
            rows, columns = np.unravel_index(picked, scores_KC.shape)
            ends = columns == scores_KC.shape[1] - 1
            for row in rows[ends]:
                if found.ends_K[row] > best[1]:
                    best = beam.texts[row], float(found.ends_K[row])
            bonus = max(self.config.length_bonus, 0.0) * (tokens_left - 1)
            going = ~ends & (scores_KC[rows, columns] + bonus > best[1])
            if not going.any():
                break
            beam = self._extend(beam, found, rows[going], columns[going])
        return best

    def _start(self) -> _Beam:
        ctc = None if self.ctc is None else self.ctc.start()
        return _Beam([[]], np.zeros(1), self.head.start(1), ctc, [self.fusion.start()])

    def _grow(self, beam: _Beam) -> _Candidates:
        """The candidates; the attention's state in ``beam`` becomes that after the last tokens."""
        config, num_texts = self.config, len(beam.texts)
        last_K = torch.tensor([text[-1] if text else SOS_EOS_ID for text in beam.texts])
        last_K = last_K.to(self.memory.bias_N11T.device)
        log_probs_KV, beam.attention = self.head.step(last_K, beam.attention, self.memory.expand(num_texts))
        ends_K = _float64(log_probs_KV[:, SOS_EOS_ID])
        log_probs_KV[:, [BLANK_ID, SOS_EOS_ID]] = -inf
        num_candidates = min(CANDIDATES_PER_BEAM * config.beam, log_probs_KV.shape[1] - 2)
        log_probs_KC, ids_KC = log_probs_KV.topk(num_candidates)
        tokens_KC = ids_KC.cpu().numpy()
        rows = zip(beam.lm, tokens_KC.tolist(), strict=True)
        fused = [[self.fusion.extend(state, token) for token in row] for state, row in rows]
        weight = 1.0 - config.ctc_weight
        base_KC = beam.base_K[:, None] + weight * _float64(log_probs_KC)
        base_KC += np.array([[score for score, _ in row] for row in fused])
        ends_K = beam.base_K + weight * ends_K + np.array([self.fusion.end(state) for state in beam.lm])
        total_KC = base_KC.copy()
        if self.ctc is not None and beam.ctc is not None:
            total_KC += config.ctc_weight * self.ctc.longer(beam.ctc, tokens_KC)
            ends_K += config.ctc_weight * self.ctc.whole(beam.ctc)
        states = [[state for _, state in row] for row in fused]
        return _Candidates(tokens_KC, base_KC, total_KC, ends_K, states)

    def _extend(self, beam: _Beam, found: _Candidates, rows: np.ndarray, columns: np.ndarray) -> _Beam:
        """The candidates that were picked."""
        tokens = found.tokens_KC[rows, columns]
        return _Beam(
            texts=[[*beam.texts[row], token] for row, token in zip(rows, tokens.tolist(), strict=True)],
            base_K=found.base_KC[rows, columns],
            attention=beam.attention.select(torch.from_numpy(rows).to(self.memory.bias_N11T.device)),
            ctc=None if self.ctc is None or beam.ctc is None else self.ctc.extend(beam.ctc, rows, tokens),
            lm=[found.lm[row][column] for row, column in zip(rows, columns, strict=True)],
        )


def _float64(x: Tensor) -> np.ndarray:
    return x.cpu().numpy().astype(np.float64)


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("attention_beam", AttentionBeam)
