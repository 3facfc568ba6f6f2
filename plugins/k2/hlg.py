"""Search in a decoding graph with k2: CTC posteriors, a lexicon and a word n-gram at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Hypothesis, LanguageModel, ModelOutput, Options, TokenTable

from .graph import Graph, compile_hlg, ctc_topology, word_ids
from .package import import_k2

INSTEAD_OF_HLG = "{name: ctc_prefix_beam}"


class K2Hlg:
    """The best path of the ``ctc`` head through HLG: only words of the n-gram occur.

    Without a language model (``lm_weight`` 0) the graph is CTC's topology alone, and the result that
    of ``ctc_greedy``.

    Args:
        config: its options.
        tokens: of the bundle.
        frame_shift_s: seconds per encoder frame.
        lm: the recipe's n-gram; the graph is made from ``words.arpa``, beside its file.

    Raises:
        MissingExtra: k2 is not installed.
        RecipeError: there is no language model, or one without a word n-gram.
        DataError: the n-gram is of no use, see :func:`kdrecipe_plugins.k2.graph.compile_hlg`.
    """

    head = "ctc"
    needs_lm: ClassVar[bool] = True
    contract_options: ClassVar[dict[str, Any]] = {"lm_weight": 0.0}

    class Config(Options):
        """Options, as in icefall.

        Args:
            search_beam: log-score by which a path may lag behind the best one of its frame.
            output_beam: log-score by which a path may lag behind the best one of its utterance.
            min_active: states kept per frame, no matter what ``search_beam`` says.
            max_active: states kept per frame at most, more than ``min_active``.
            lm_weight: factor on the n-gram's log-probabilities.
        """

        search_beam: float = Field(default=20.0, gt=0, allow_inf_nan=False)
        output_beam: float = Field(default=8.0, gt=0, allow_inf_nan=False)
        min_active: int = Field(default=30, ge=0)
        max_active: int = Field(default=10000, ge=1)
        lm_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="after")
        def _active(self) -> K2Hlg.Config:
            if self.max_active <= self.min_active:
                raise ValueError("max_active must be above min_active")
            return self

    def __init__(
        self, config: Config, tokens: TokenTable, frame_shift_s: float, lm: LanguageModel | None = None
    ) -> None:
        self.k2 = import_k2("k2_hlg", INSTEAD_OF_HLG)
        self.config = config
        self.tokens = tokens
        self.frame_shift_s = frame_shift_s
        self.graph = self._graph(lm)

    def _graph(self, lm: LanguageModel | None) -> Graph:
        if lm is None and self.config.lm_weight == 0:
            return ctc_topology(self.k2, len(self.tokens))
        if lm is None:
            raise RecipeError("k2_hlg needs a language model", remedy="add lm: {name: ngram} to the recipe")
        path: Path | None = getattr(lm, "path", None)
        if path is None:
            raise RecipeError("k2_hlg needs an n-gram over words", remedy="use lm: {name: ngram}")
        return compile_hlg(self.k2, Path(path).with_name("words.arpa"), self.tokens, self.config.lm_weight)

    @torch.no_grad()
    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """One hypothesis per utterance; its score is that of the best path, the n-gram's share included.

        An utterance of which no path is left at its end has an empty hypothesis without a score.
        """
        results = [Hypothesis("", score=0.0) for _ in out.lens_B]
        rows = out.lens_B.cpu().nonzero().flatten()
        if len(rows) == 0:
            return results
        log_probs_BTV = out.logits[self.head].float().log_softmax(-1).cpu()
        segments = torch.stack([rows, torch.zeros_like(rows), out.lens_B.cpu()[rows]], dim=1)
        lattice = self.k2.intersect_dense_pruned(
            self.graph.fsa,
            self.k2.DenseFsaVec(log_probs_BTV, segments.to(torch.int32)),
            search_beam=self.config.search_beam,
            output_beam=self.config.output_beam,
            min_active_states=self.config.min_active,
            max_active_states=self.config.max_active,
        )
        best = self.k2.shortest_path(lattice, use_double_scores=True)
        for number, row in enumerate(rows.tolist()):
            results[row] = self._hypothesis(best[number])
        return results

    def _hypothesis(self, path: Any) -> Hypothesis:
        """Of a linear FSA, which has one arc per frame and one to the final state."""
        if path.num_arcs == 0:
            return Hypothesis("")
        starts = path.tokens.clamp_min(0).nonzero().flatten()
        ids = path.tokens[starts].tolist()
        times_s = [frame * self.frame_shift_s for frame in starts.tolist()]
        score = float(path.scores.double().sum())
        if not self.graph.words:
            return Hypothesis(self.tokens.decode(ids), ids, times_s, score)
        words = [self.graph.words[word] for word in word_ids(path).tolist() if word > 0]
        return Hypothesis(" ".join(words), ids, times_s, score)
