"""How good a model is on the development split while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdrecipe.data.batches import CutBatches
from kdrecipe.frames import edit_distance
from kdrecipe.interfaces import Batch, LossOutput, ModelOutput, Progress, Targets
from kdrecipe.train.log import Meter, normalised
from kdrecipe.train.objective import Term
from kdrecipe.train.step import Stepper

if TYPE_CHECKING:
    from kdrecipe.model.asr import AsrModel


@dataclass(frozen=True)
class DevScore:
    """Of a model on the dev split.

    Args:
        loss: the supervised terms, weighted; None if the objective has none.
        ter: token errors per reference token, greedy search of the first head; None without labels.
        said: tokens found per reference token; None without labels.
    """

    loss: float | None
    ter: float | None
    said: float | None = None


@torch.no_grad()
def token_error_rate(model: AsrModel, dev: CutBatches, device: torch.device) -> float | None:
    """Token errors per reference token, greedy search of the first head, in float32; None without labels."""
    errors = tokens = 0
    was_training = model.training
    model.eval()
    for ids in dev.epoch(0):
        batch = dev.load(ids).map(lambda x: x.to(device))
        wrong, length = token_errors(model.greedy(model(batch.features_BTF, batch.lens_B)), batch)
        errors, tokens = errors + wrong, tokens + length
    model.train(was_training)
    return errors / tokens if tokens else None


@torch.no_grad()
def evaluate(stepper: Stepper, dev: CutBatches) -> DevScore:
    """Score ``stepper``'s model, each process a part of the split."""
    model, workers = stepper.model, stepper.workers
    terms = stepper.objective.terms
    supervised = [t for t in terms if t.supervised and not t.teachers and t.fade_steps is None]
    meter = Meter()
    errors = tokens = said = 0
    model.eval()
    stepper.objective.module.eval()
    plan = dev.epoch(0)
    mine = plan[workers.rank :: workers.world_size]
    # A divided model speaks only if all processes ask it.
    idle = -(-len(plan) // workers.world_size) - len(mine) if stepper.sharded else 0
    for number, ids in enumerate(mine + plan[:1] * idle):
        batch = dev.load(ids).map(lambda x: x.to(workers.device))
        with stepper.autocast():
            out = model(batch.features_BTF, batch.lens_B, taps=stepper.objective.taps, batch=batch)
        if number >= len(mine):
            break
        out = out.map(lambda x: x.float() if x.is_floating_point() else x)
        for term in supervised:
            meter.add([term.name], [_supervised_loss(term, out, batch, stepper.objective.progress(0))])
        with stepper.autocast():
            found = model.greedy(out)  # type: ignore[operator]
        wrong, length = token_errors(found, batch)
        errors, tokens = errors + wrong, tokens + length
        rows = zip(found, batch.labelled_B.tolist(), strict=True)
        said += sum(len(row) for row, labelled in rows if labelled)
    if stepper.sharded:
        from kdrecipe.train.sharding import rest

        rest(model)
    model.train()
    stepper.objective.module.train()
    own = {"errors|": errors, "tokens|": tokens, "said|": said}
    numbers = workers.sum_numbers({**meter.numbers(), **own})
    errors, tokens, said = (int(numbers.pop(key)) for key in own)
    loss, _, _ = normalised(numbers, {term.name: term.weight for term in supervised})
    return DevScore(loss, errors / tokens if tokens else None, said / tokens if tokens else None)


def _supervised_loss(term: Term, out: ModelOutput, batch: Batch, progress: Progress) -> LossOutput:
    if bool(batch.labelled_B.all()):
        return term(out, Targets(), batch, progress)
    return term(out.select(batch.labelled_B), Targets(), batch.select(batch.labelled_B), progress)


def token_errors(found: Sequence[Sequence[int]], batch: Batch) -> tuple[int, int]:
    """(errors, reference tokens) of ``found`` on the labelled utterances."""
    errors = length = 0
    rows = zip(
        found, batch.tokens_BU.tolist(), batch.token_lens_B.tolist(), batch.labelled_B.tolist(), strict=True
    )
    for hypothesis, padded, size, labelled in rows:
        if labelled:
            errors += edit_distance(padded[:size], hypothesis)
            length += size
    return errors, length
