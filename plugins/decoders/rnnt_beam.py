"""Transducer beam search with at most one token per frame (``modified_beam_search`` of icefall, sherpa-onnx).

Per frame a hypothesis takes the blank or a token; those that become the same text are added up. So
if the beam drops nothing, a hypothesis scores with the log-probability of all its paths of
that kind. In the end, as there, the best score per token wins. With a language model this is
shallow fusion.

K hypotheses, T frames, V vocabulary, J width of the joiner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import (
    BLANK_ID,
    UNK_ID,
    Hypothesis,
    LanguageModel,
    ModelOutput,
    Options,
    TokenTable,
)
from kdrecipe.lattice.ctc import log_add

from .fusion import Fusion

FUSED_PER_BEAM = 2  # candidates per frame that fusion scores, in beams


class RnntBeam:
    """Modified beam search on the ``rnnt`` head.

    Args:
        config: its options.
        tokens: of the bundle.
        frame_shift_s: seconds per encoder frame.
        lm: over the same tokens; None where ``lm_weight`` is 0.

    Raises:
        RecipeError: ``lm_weight`` without a language model.
    """

    head = "rnnt"
    tiny_options: ClassVar[dict[str, int]] = {"beam": 2}

    class Config(Options):
        """Options.

        Args:
            beam: hypotheses kept after every frame.
            lm_weight: of the language model's log-probability.
            length_bonus: added per token.
        """

        beam: int = Field(default=4, ge=1)
        lm_weight: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
        length_bonus: float = Field(default=0.0, allow_inf_nan=False)

    def __init__(
        self, config: Config, tokens: TokenTable, frame_shift_s: float, lm: LanguageModel | None = None
    ) -> None:
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s
        self.fusion = Fusion.of("rnnt_beam", config, lm)

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance, with its score (not per token); a token starts at its frame."""
        head: Any = model.get_submodule(f"heads.{self.head}")
        encoder_BTJ = head.encode(out.hidden_BTD)
        results = []
        for encoder_TJ, length in zip(encoder_BTJ, out.lens_B.tolist(), strict=True):
            best = self._search(head, encoder_TJ[:length])
            times_s = [frame * self.frame_shift_s for frame in best.frames]
            results.append(Hypothesis(self.tokens.decode(best.text), list(best.text), times_s, best.score))
        return results

    def _search(self, head: Any, encoder_TJ: Tensor) -> _Path:
        state = head.start(1)
        predictor_KJ = head.predict(state)
        beam = [_Path(lm=self.fusion.start())]
        for frame, encoder_J in enumerate(encoder_TJ):
            log_probs_KV = head.join(encoder_J, predictor_KJ).double().log_softmax(-1)
            beam, parents, tokens = self._next(beam, log_probs_KV, frame)
            if any(tokens):
                state = state.select(torch.tensor(parents, device=encoder_J.device))
                tokens_K = torch.tensor(tokens, device=encoder_J.device)
                state = state.replace(tokens_K != BLANK_ID, head.advance(state, tokens_K))
                predictor_KJ = head.predict(state)
            elif parents != list(range(len(predictor_KJ))):
                rows_K = torch.tensor(parents, device=encoder_J.device)
                state, predictor_KJ = state.select(rows_K), predictor_KJ[rows_K]
        for path in beam:
            path.score += self.fusion.end(path.lm)
        # the context that sherpa-onnx begins with counts as tokens
        num_before = getattr(head.predictor, "context_size", 1)
        return max(beam, key=lambda path: path.score / (len(path.text) + num_before))

    def _next(
        self, beam: list[_Path], log_probs_KV: Tensor, frame: int
    ) -> tuple[list[_Path], list[int], list[int]]:
        """The beam after a frame: hypotheses, the number of each one's parent, its token (or the blank)."""
        scores_K = torch.tensor([path.score for path in beam], dtype=torch.float64)
        scores_KV = log_probs_KV + scores_K.to(log_probs_KV.device)[:, None]
        num_candidates = self.config.beam * (FUSED_PER_BEAM if self.fusion else 1)
        best_N, places_N = scores_KV.flatten().topk(min(num_candidates, scores_KV.numel()))
        merged: dict[tuple[int, ...], tuple[_Path, int, int]] = {}
        for score, place in zip(best_N.tolist(), places_N.tolist(), strict=True):
            parent, token = divmod(place, scores_KV.shape[1])
            path = beam[parent]
            if token in (BLANK_ID, UNK_ID):
                token = BLANK_ID
                path = _Path(path.text, path.frames, score, path.lm)
            else:
                path = self._longer(path, token, frame, score)
            same = merged.get(path.text)
            if same is None:
                merged[path.text] = path, parent, token
            else:  # the times stay those of the better one
                same[0].score = log_add(same[0].score, path.score)
        kept = list(merged.values())
        if len(kept) > self.config.beam:
            kept = sorted(kept, key=lambda item: -item[0].score)[: self.config.beam]
        paths, parents, tokens = zip(*kept, strict=True)
        return list(paths), list(parents), list(tokens)

    def _longer(self, path: _Path, token: int, frame: int, score: float) -> _Path:
        fused, lm = self.fusion.extend(path.lm, token)
        return _Path((*path.text, token), (*path.frames, frame), score + fused, lm)


@dataclass
class _Path:
    """A hypothesis: its tokens and their frames, its score, and the language model's state after it."""

    text: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()
    score: float = 0.0
    lm: Any = field(default=None, repr=False)


@hookimpl
def register_decoders(register: Callable[[str, type], None]) -> None:
    register("rnnt_beam", RnntBeam)
