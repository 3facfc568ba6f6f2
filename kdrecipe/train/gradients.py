"""Gradients of a system's own objective, for compressors that ask what each weight is worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdrecipe.frames import full_precision
from kdrecipe.interfaces import Batch
from kdrecipe.targets import TargetSource
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.objective import Objective, Term, count_vector, scales_of, weighted_sum
from kdrecipe.train.step import along_with

if TYPE_CHECKING:
    from kdrecipe.model.asr import AsrModel


def gradients(
    model: AsrModel,
    batches: Iterable[Batch],
    objective: Objective,
    teachers: Mapping[str, TargetSource],
    device: torch.device,
) -> Iterator[Batch]:
    """Each batch on ``device``, with the gradients of what it teaches; see ``CompressContext.gradients``.

    In float32, without dropout and masks, all terms at work from the start: twice the same numbers.
    """
    objective = _without_own_weights(objective)
    objective.module.to(device).eval()
    for teacher in teachers.values():
        if isinstance(teacher, MovingAverage):
            teacher.start(model)
    was_training = model.training
    _evaluating(model)
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            if _backward(model, batch := batch.map(lambda x: x.to(device)), objective, teachers):
                yield batch
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _without_own_weights(objective: Objective) -> Objective:
    """The terms without weights of their own; all, if all have some."""

    def has_weights(term: Term) -> bool:
        return isinstance(term.loss, nn.Module) and any(True for _ in term.loss.parameters())

    chosen = Objective([t for t in objective.terms if not has_weights(t)] or objective.terms)
    chosen.labelled_share = objective.labelled_share
    return chosen


def _evaluating(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):  # a GPU's LSTM has gradients in training mode only
            module.train()


def _backward(
    model: AsrModel, batch: Batch, objective: Objective, teachers: Mapping[str, TargetSource]
) -> bool:
    """Leave the gradients of one batch; False if it teaches nothing."""
    targets = objective.targets(teachers, batch)
    batch = along_with(batch, targets)
    repeated = batch.repeat(objective.num_views)
    with torch.enable_grad():
        out = model(repeated.features_BTF, repeated.lens_B, taps=objective.taps, batch=repeated)
        out = out.map(full_precision)
        out.num_views = objective.num_views
        found = objective.evaluate(out, targets, batch)
        device = batch.features_BTF.device
        weights = torch.tensor(objective.weights, dtype=torch.float64, device=device)
        counts = count_vector(found, device)
        loss = weighted_sum(found, scales_of(weights, counts))
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
    return loss is not None
