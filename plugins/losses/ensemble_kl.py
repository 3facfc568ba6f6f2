"""KL to several teachers at once, each weighted by how far it can be trusted with an utterance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import ctc_greedy, edit_distance, frame_mask
from kdrecipe.interfaces import (
    BLANK_ID,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Posteriors,
    Targets,
    TargetSpec,
)

from .posteriors import HeadOptions, compare, kl


class EnsembleKl:
    """``T^2 * sum over frames (or tokens) and teachers k of w_k KL(p_k || q)``, the w_k adding up to 1.

    Distillation from an ensemble (Gao 2020, arXiv 2005.09310; checked against the authors' code): ``mean`` is
    their strategy *average*, ``error`` is *weighted*, a softmax over the teachers of minus their error rate,
    and ``best: true`` is *best*, the teacher with the fewest errors in this utterance alone. Theirs takes the
    mean error over a batch for the weights; here they are the utterance's own, so that no utterance
    depends on its neighbours.

    A teacher's error is that of its tokens against the transcript: with ``head: ctc`` of its best path, with
    ``attention`` of its best token given the transcript before it. Utterances without a transcript, and
    ``weights: confidence``, take ``1 - mean posterior of the best class`` over the frames on which that is
    not the blank (or the tokens).

    Count: the frames or tokens. Metrics ``agree_<teacher>``: those whose best class is that teacher's.

    Raises:
        RecipeError: a teacher has other tokens than the student, the student lacks the head, or ``fixed``
            does not name the teachers.
        DataError: frame counts differ.
    """

    all_teachers: ClassVar[bool] = True

    class Config(HeadOptions):
        """Options of ``ensemble_kl``.

        Args:
            weights: ``mean``: all the same; ``fixed``: as said there; ``error``: by each teacher's token
                error in the utterance; ``confidence``: by how sure it is.
            fixed: teacher -> weight, above 0, divided by their sum.
            best: the best teacher of each utterance alone, by ``error`` or ``confidence``; of equals, all.
            sharpness: an error rate of 0.1 more divides a weight by ``exp(sharpness / 10)``.
            temperature: T, above 0.
            top_k: classes kept per frame; None: all.
        """

        weights: Literal["mean", "fixed", "error", "confidence"] = "mean"
        fixed: dict[str, float] = {}
        best: bool = False
        sharpness: float = Field(10.0, gt=0)
        temperature: float = Field(1.0, gt=0)
        top_k: int | None = Field(None, ge=1)

        @model_validator(mode="after")
        def _fits(self) -> EnsembleKl.Config:
            if (self.weights == "fixed") != bool(self.fixed):
                raise ValueError("weights: fixed and fixed: {<teacher>: <weight>} go together")
            if any(weight <= 0 for weight in self.fixed.values()):
                raise ValueError("fixed: weights are above 0")
            if self.best and self.weights not in ("error", "confidence"):
                raise ValueError(f"best: true chooses by weights: error or confidence, not {self.weights}")
            return self

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        setup.require_head(config.head, "ensemble_kl")
        setup.require_same_tokens("ensemble_kl")
        if config.fixed and setup.teachers and set(config.fixed) != set(setup.teachers):
            odd = sorted(set(config.fixed) ^ set(setup.teachers))
            what = "named, but no teacher" if odd[0] in config.fixed else "a teacher without a weight"
            raise RecipeError(
                f"ensemble_kl, fixed: {odd[0]!r} is {what}", remedy=did_you_mean(odd[0], setup.teachers)
            )

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """Posteriors of each teacher."""
        return config.needs()

    def __call__(self, out: ModelOutput, targets: Mapping[str, Targets], batch: Batch) -> LossOutput:
        """Sum over frames or tokens; see the class."""
        config, head = self.config, self.config.head
        lens_B = config.lens_B(out, batch)
        said = {name: config.said(its) for name, its in targets.items()}
        weights_KB = self._weights(said, batch)
        total, metrics = out.logits[head].new_zeros(()), {}
        for (name, teacher), weights_B in zip(said.items(), weights_KB, strict=True):
            both = compare(out.logits[head], lens_B, teacher, config.temperature)
            kl_N = kl(both.log_p_NK, both.log_q_NK)
            total = total + config.temperature**2 * (kl_N * weights_B.to(kl_N)[both.rows_N]).sum()
            metrics[f"agree_{name}"] = both.agree()
        return LossOutput(total, lens_B.sum(), metrics)

    def _weights(self, said: Mapping[str, Posteriors], batch: Batch) -> Tensor:
        """(teachers, B), adding up to 1 over the teachers."""
        config = self.config
        first = next(iter(said.values())).log_probs_BTK
        if config.weights in ("mean", "fixed"):
            given = [config.fixed.get(name, 1.0) for name in said]
            shares = first.new_tensor([x / sum(given) for x in given])
            return shares[:, None].expand(-1, len(first))
        errors_KB = torch.stack([self._errors(posteriors, batch) for posteriors in said.values()])
        if config.best:
            is_best_KB = (errors_KB <= errors_KB.amin(0) + 1e-6).float()
            return is_best_KB / is_best_KB.sum(0)
        return (-config.sharpness * errors_KB).softmax(0)

    def _errors(self, said: Posteriors, batch: Batch) -> Tensor:
        """(B,) error rates, 0 or more: counted where that is wanted and possible, else estimated."""
        log_probs_BT, at_BT = said.log_probs_BTK.detach().max(-1)
        best_BT = at_BT if said.indices_BTK is None else said.indices_BTK.gather(-1, at_BT[..., None])[..., 0]
        used_BT = frame_mask(said.lens_B, best_BT.shape[1])
        if self.config.head == "ctc":
            used_BT = used_BT & (best_BT != BLANK_ID)
        sure_B = (log_probs_BT.exp() * used_BT).sum(1) / used_BT.sum(1).clamp(min=1)
        errors_B = 1 - sure_B
        if self.config.weights == "confidence":
            return errors_B
        counted_B = self._counted(best_BT, said.lens_B, batch).to(errors_B)
        known_B = batch.labelled_B & (batch.token_lens_B > 0)
        return counted_B.where(known_B, errors_B)

    def _counted(self, best_BT: Tensor, lens_B: Tensor, batch: Batch) -> Tensor:
        """(B,) token errors per token of the transcript."""
        lengths = batch.token_lens_B.tolist()
        if self.config.head == "attention":
            size = min(best_BT.shape[1], batch.tokens_BU.shape[1])
            wrong_BU = best_BT[:, :size] != batch.tokens_BU[:, :size]
            wrong_B = (wrong_BU & frame_mask(batch.token_lens_B, size)).sum(1)
            return wrong_B / batch.token_lens_B.clamp(min=1)
        heard, _ = ctc_greedy(F.one_hot(best_BT), lens_B)
        texts = [row[:n] for row, n in zip(batch.tokens_BU.tolist(), lengths, strict=True)]
        rates = [_error_rate(tuple(t), tuple(h)) for t, h in zip(texts, heard, strict=True)]
        return torch.tensor(rates, device=best_BT.device)


@lru_cache(maxsize=100_000)
def _error_rate(text: tuple[int, ...], heard: tuple[int, ...]) -> float:
    """Kept, since a teacher with cached targets says the same in every epoch."""
    return edit_distance(text, heard) / max(1, len(text))


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``ensemble_kl`` known."""
    register("ensemble_kl", EnsembleKl)
