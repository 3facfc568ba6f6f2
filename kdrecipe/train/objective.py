"""What is minimised: weighted loss terms over a batch, each with the targets of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdrecipe.errors import TrainingError
from kdrecipe.interfaces import (
    Batch,
    GivenTargets,
    Loss,
    LossOutput,
    ModelOutput,
    Progress,
    Targets,
    call_loss,
)
from kdrecipe.plugin.returned import returned
from kdrecipe.targets import TargetSource


@dataclass(frozen=True)
class Term:
    """One loss of an objective.

    Args:
        name: in logs, unique within the objective.
        weight: factor of the normalised loss (its sum over its count).
        loss: see :class:`kdrecipe.interfaces.Loss`.
        teacher: whose targets it gets; None for losses that need none, or all teachers'.
        start_below: dev token error below which it begins; None: it is there from the start.
        fade_steps: its weight falls to 0 over the first so many steps, and then it is gone; such a term is no
            part of the loss that is logged and scored on dev. None: it stays.
        all_teachers: whose targets it gets, all at once, if the loss asks for that.
    """

    name: str
    weight: float
    loss: Loss
    teacher: str | None = None
    start_below: float | None = None
    fade_steps: int | None = None
    all_teachers: tuple[str, ...] = ()

    def share(self, step: int) -> float:
        """Of its weight, at ``step`` (from 1)."""
        return 1.0 if self.fade_steps is None else max(0.0, 1 - (step - 1) / self.fade_steps)

    @property
    def supervised(self) -> bool:
        """Whether it sees labelled utterances only."""
        return bool(getattr(self.loss, "supervised", False))

    @property
    def teachers(self) -> tuple[str, ...]:
        """All that it learns from."""
        return self.all_teachers or (() if self.teacher is None else (self.teacher,))

    def given(
        self, targets: Mapping[str, Targets], change: Callable[[Tensor], Tensor] | None = None
    ) -> GivenTargets:
        """Its part of all teachers' targets, perhaps with every tensor changed."""
        mine = {n: targets[n].map(change) if change else targets[n] for n in self.teachers}
        return mine if self.all_teachers else next(iter(mine.values()), Targets())

    def __call__(
        self, out: ModelOutput, targets: GivenTargets, batch: Batch, progress: Progress
    ) -> LossOutput:
        """The loss; PluginError if it gives anything else than a LossOutput."""
        found = call_loss(self.loss, out, targets, batch, progress)
        return returned(found, LossOutput, f"loss {self.name!r}", "__call__")


class Objective:
    """Weighted terms.

    Args:
        terms: at least one, names all different.

    Raises:
        TrainingError: no term, or two of the same name.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise TrainingError("there is no loss to minimise", remedy="give the system at least one loss")
        names = [term.name for term in terms]
        if len(set(names)) < len(names):
            raise TrainingError(f"two loss terms have the same name: {', '.join(names)}")
        self.terms = list(terms)
        self._since: list[int | None] = [0] * len(terms)  # steps before each began; None: it has not
        self._shares: list[float] = [1.0] * len(terms)
        self._step = 1
        self.num_steps = 1
        """The most that the run will have."""
        self.labelled_share: float = 1.0
        """Of the training utterances. Beside terms that see all of them, a supervised one weighs by this
        share, as in a mean over all utterances: the few labelled ones of a batch would drown the others."""
        self.taps: tuple[str, ...] = tuple(
            dict.fromkeys(t for x in terms for t in getattr(x.loss, "taps", ()))
        )
        """Intermediate tensors of the student that some loss reads (its attribute ``taps``)."""
        self.module = nn.ModuleDict(
            {str(i): term.loss for i, term in enumerate(terms) if isinstance(term.loss, nn.Module)}
        )
        """The losses that own parameters or buffers."""

    @property
    def num_views(self) -> int:
        """Differently augmented copies of each batch that some term at work asks for."""
        at_work = zip(self.terms, self.at_work, strict=True)
        return max(int(getattr(term.loss, "num_views", 1)) for term, works in at_work if works)

    @property
    def at_work(self) -> list[bool]:
        """Which terms are computed; the others are 0 of 0."""
        pairs = zip(self._since, self._shares, strict=True)
        return [since is not None and share > 0 for since, share in pairs]

    def begin(self, history: Sequence[tuple[int, float | None]]) -> None:
        """Put to work the terms whose time has come; all of them if none stays otherwise.

        Args:
            history: steps done and dev token error (None: not known) at each place where one was looked
                at, in order.
        """
        since, lowest = self._begun([None for _ in self.terms], 0, None), None
        for step, error in history:
            lowest = error if lowest is None else min(lowest, lowest if error is None else error)
            since = self._begun(since, step, lowest)
        self._since = since

    def _begun(self, before: Sequence[int | None], step: int, lowest: float | None) -> list[int | None]:
        """Since when each term is at work, if it is: ``before``, or ``step``."""
        due = [has_begun(term.start_below, lowest) for term in self.terms]
        if not any(is_due and term.fade_steps is None for is_due, term in zip(due, self.terms, strict=True)):
            due = [True] * len(self.terms)
        return [(step if b is None else b) if is_due else None for is_due, b in zip(due, before, strict=True)]

    def at_step(self, step: int) -> None:
        """Weights and schedules are those of ``step`` (from 1) until the next call."""
        self._step = step
        self._shares = [term.share(step) for term in self.terms]

    def progress(self, since: int | None) -> Progress:
        """Of a term that began after so many steps."""
        since = min(since or 0, self._step - 1)
        return Progress(self._step - since, max(1, self.num_steps - since))

    def after_step(self, values: Sequence[float]) -> None:
        """Tell the losses that ask for it their values over the whole step, where they were at work."""
        terms = zip(self.terms, values, self._since, self.at_work, strict=True)
        for term, value, since, works in terms:
            if works and hasattr(term.loss, "after_step"):
                term.loss.after_step(value, self.progress(since))

    @property
    def listens(self) -> bool:
        """Whether some loss has an ``after_step``."""
        return any(hasattr(term.loss, "after_step") for term in self.terms)

    @property
    def weights(self) -> list[float]:
        """Weight of each term at this step."""
        labelled = 1.0 if self.supervised_only else self.labelled_share
        return [
            term.weight * share * (labelled if term.supervised else 1.0)
            for term, share in zip(self.terms, self._shares, strict=True)
        ]

    @property
    def supervised_only(self) -> bool:
        """Whether unlabelled utterances teach nothing here."""
        return all(term.supervised for term in self.terms)

    def targets(self, teachers: Mapping[str, TargetSource], batch: Batch) -> dict[str, Targets]:
        """What every teacher that a term asks for says about the clean ``batch``, on its device."""
        device = batch.features_BTF.device
        names = dict.fromkeys(name for term in self.terms for name in term.teachers)
        return {name: teachers[name].targets(batch).map(lambda x: x.to(device)) for name in names}

    def evaluate(
        self, out: ModelOutput, targets: Mapping[str, Targets], batch: Batch, of_views: bool = False
    ) -> list[LossOutput]:
        """The terms on a batch, none of them normalised yet.

        Args:
            out: of the student; with views, one whole copy of the batch after the other.
            targets: by teacher, one row per utterance of ``batch`` (not repeated for views).
            batch: one view.
            of_views: there is a row of targets per utterance of each view instead.

        Returns:
            One output per term; 0 of 0 where a supervised term has no labelled utterance.
        """
        num_views = out.num_views
        repeated = batch.repeat(num_views)
        copies = 1 if of_views else num_views
        wide = {
            name: t if copies == 1 else t.map(lambda x: x.repeat(copies, *[1] * (x.dim() - 1)))
            for name, t in targets.items()
        }
        num_labelled = int(batch.labelled_B.sum())
        outputs = []
        for term, since, works in zip(self.terms, self._since, self.at_work, strict=True):
            progress = self.progress(since)
            if not works or (term.supervised and num_labelled == 0):
                outputs.append(LossOutput(out.hidden_BTD.new_zeros(()), 0))
            elif not term.supervised or num_labelled == len(batch):
                outputs.append(term(out, term.given(wide), repeated, progress))
            else:
                rows_B = repeated.labelled_B
                chosen = term.given(wide, lambda x, rows_B=rows_B: x[rows_B])  # type: ignore[misc]
                outputs.append(term(out.select(rows_B), chosen, repeated.select(rows_B), progress))
        return outputs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The losses' own parameters, trained with the student."""
        for name, parameter in self.module.named_parameters():
            yield f"losses.{name}", parameter


def has_begun(start_below: float | None, lowest: float | None) -> bool:
    """Whether something that waits for a dev token error below ``start_below`` is due."""
    return start_below is None or (lowest is not None and lowest < start_below)


def count_vector(outputs: Sequence[LossOutput], device: torch.device) -> Tensor:
    """float64 (terms,) counts."""
    return torch.stack([torch.as_tensor(o.count, dtype=torch.float64, device=device) for o in outputs])


def scales_of(weights: Tensor, counts: Tensor) -> Tensor:
    """weight / count, 0 where a term saw nothing in the whole step."""
    return torch.where(counts > 0, weights / counts.clamp(min=1e-9), torch.zeros_like(counts))


def weighted_sum(outputs: Sequence[LossOutput], scales: Tensor) -> Tensor | None:
    """``sum_i scales_i * total_i`` over the terms that have a gradient; None if none has."""
    parts: list[Any] = [
        o.total * s.to(o.total.dtype) for o, s in zip(outputs, scales, strict=True) if o.total.requires_grad
    ]
    return cast(Tensor, sum(parts[1:], parts[0])) if parts else None
