"""One optimiser step: forward, losses, exact normalisation, backward, clipping, update."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from kdrecipe.errors import TrainingError
from kdrecipe.frames import full_precision
from kdrecipe.interfaces import Batch, LossOutput, ModelOutput, Targets
from kdrecipe.targets import TargetSource
from kdrecipe.train.distribution import Workers
from kdrecipe.train.divergence import stop
from kdrecipe.train.log import Meter
from kdrecipe.train.objective import Objective, count_vector, scales_of, weighted_sum
from kdrecipe.train.optimisation import autocast_dtype, clip_gradients, seed_step
from kdrecipe.train.spec_augment import spec_augment
from kdrecipe.train.together import Together

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import Training
    from kdrecipe.train.sharding import Sharded

# fp16's loss scale starts high and is halved after each overflow: so many in a row mean
# that no scale works.
_MAX_OVERFLOWS = 20

_PROVISIONAL_COUNT = 1000.0  # about a step's: keeps gradients in fp16's range


@dataclass
class Micro:
    """A micro-batch, its teachers' targets, and its number among all of the step's.

    Args:
        batch: one view.
        targets: by teacher; a row for each utterance, or for each utterance of each view.
        slot: the number.
        of_views: whether there are targets for each view.
        counts: False: it is computed for the sake of the other processes, see :mod:`kdrecipe.train.sharding`.
    """

    batch: Batch
    targets: dict[str, Targets]
    slot: int
    of_views: bool = False
    counts: bool = True


@dataclass
class Seen:
    """The last micro-batch of a step, as the hook ``train_metrics`` gets it."""

    student: ModelOutput
    targets: Mapping[str, Targets]
    batch: Batch


class Stepper:
    """Does optimiser steps.

    Args:
        model: the student, on the workers' device.
        objective: what is minimised.
        teachers: by name.
        optimizer: of the student's and the losses' parameters.
        options: the recipe's ``training``.
        workers: this process among all.
        seed: of the run.
        work_dir: where a batch with non-finite results is saved.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        teachers: Mapping[str, TargetSource],
        optimizer: Optimizer,
        options: Training,
        workers: Workers,
        seed: int,
        work_dir: Path,
    ) -> None:
        self.model = model
        self.objective = objective
        self.teachers = teachers
        self.optimizer = optimizer
        self.options = options
        self.workers = workers
        self.seed = seed
        self.work_dir = work_dir
        self.meter = Meter()
        self.penalty: Callable[[int], Tensor] | None = None
        """What is added to the loss of each step, by its number."""
        self.masked_teachers = False
        """Whether teachers hear the student's masks; see :func:`kdrecipe.train.loop.train`."""
        self.names = [term.name for term in objective.terms]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.dtype = autocast_dtype(options.precision, workers.device)
        self.scaler = GradScaler(workers.device.type, enabled=self.dtype == torch.float16)
        self.sharded = options.shard and workers.world_size > 1
        """Whether the model is divided among the processes: see :mod:`kdrecipe.train.sharding`."""
        self._overflows = 0
        self._last: tuple[Sequence[Batch], Sequence[Sequence[LossOutput]]] = (), ()
        assert options.spec_augment != "auto"  # the loop knows what that is for this model
        self.masks = options.spec_augment
        self.masks_begun = self.masks is not None
        """Whether the input is masked by now: see :class:`kdrecipe.recipe.sections.SpecAugment`."""

    def run(
        self, batches: Sequence[Batch], step: int, keep: bool = False, idle: Sequence[Batch] = ()
    ) -> tuple[float, Seen | None]:
        """Do step ``step`` on this process's micro-batches (perhaps none).

        Args:
            batches: of this process.
            step: from 1.
            keep: whether what the last micro-batch gave is returned.
            idle: batches to be computed along, which do not count.

        Returns:
            Norm of the gradient before clipping; if ``keep``, what the last micro-batch gave.

        Raises:
            TrainingError: loss or gradient is not finite, or memory ran out.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.at_step(step)
        micros = [self._micro(batch, slot, step) for slot, batch in enumerate(batches)]
        micros += [replace(self._micro(batch, 0, step), counts=False) for batch in idle]
        with memory_errors(batches, self.options):
            outputs, seen = self.backward(micros, step, keep)
        if self.together is not None:
            self.together.finish()
        if self.penalty is not None:
            self._add_penalty(self.penalty(step))
        self._last = batches, outputs[: len(batches)]
        norm = self._update(outputs, batches, step)
        if self.objective.listens:
            self.objective.after_step(self._values(outputs))
        for output in outputs:
            self.meter.add(self.names, output)
        return norm, seen

    def _values(self, outputs: Sequence[Sequence[LossOutput]]) -> list[float]:
        """Total over count of each term in the whole step, on all processes."""
        totals, device = torch.zeros_like(self.weights), self.workers.device
        for found in outputs:
            totals += torch.stack([o.total.detach().to(device, torch.float64) for o in found])
        counts = self._sum_counts(outputs)
        values: list[float] = (self.workers.sum(totals) / counts.clamp(min=1e-9)).tolist()
        return values

    @property
    def weights(self) -> Tensor:
        """float64, of the objective's terms at this step."""
        return torch.tensor(self.objective.weights, dtype=torch.float64, device=self.workers.device)

    def _update(self, outputs: Sequence[Sequence[LossOutput]], batches: Sequence[Batch], step: int) -> float:
        """Clip and do the optimiser's step; returns the gradient's norm before clipping.

        A step in which no utterance taught anything has no gradients. Then the scaler must not be
        asked either: it refuses to unscale twice without an update, and to update without gradients.
        """
        if all(p.grad is None for p in self.parameters):
            return 0.0
        self.scaler.unscale_(self.optimizer)
        clip = clip_gradients
        if self.sharded:
            from kdrecipe.train.sharding import clip_sharded as clip
        norm = float(clip(self.parameters, self.options.grad_clip))
        self._check_finite(norm, outputs, batches, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def try_out(self, batch: Batch) -> None:
        """Do all of a step but the update, to see whether memory suffices; nothing is changed.

        The optimiser's state is allocated meanwhile, as it is from the second step on; so are the
        gradients, if there is more than one micro-batch per step.
        """
        modules = (self.model, self.objective.module)
        kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
        with memory_errors([batch], self.options), self._optimizer_state():
            if self.options.accumulate == 1:
                self.optimizer.zero_grad(set_to_none=True)
            # Not through `backward`: each process has this batch, and none may wait for another.
            outputs, _ = self._forward(self._micro(batch, 0), step=0)
            loss = weighted_sum(outputs, torch.zeros_like(self.weights))
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)

    @contextlib.contextmanager
    def _optimizer_state(self) -> Iterator[None]:
        """Give the optimiser the state of a run under way, and gradients of 0; then as it was before.

        The state is what an update makes of these gradients. Weights are kept on the CPU meanwhile: a
        copy beside them would need memory that training does not. A resumed run has its state.
        """
        if self.sharded:  # a small part of what one process has
            yield
            return
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        if self.optimizer.state:
            yield
            return
        before = copy.deepcopy(self.optimizer.state_dict())
        weights = [p.detach().to("cpu", copy=True) for p in self.parameters]
        self.optimizer.step()
        with torch.no_grad():
            for p, value in zip(self.parameters, weights, strict=True):
                p.copy_(value)
        del weights
        yield
        self.optimizer.load_state_dict(before)

    def backward(
        self, micros: Sequence[Micro], step: int, keep: bool = False
    ) -> tuple[list[list[LossOutput]], Seen | None]:
        """Gradients of ``sum_i weight_i * total_i / count_i``, totals and counts over the whole step.

        The counts of *all* micro-batches on *all* processes must be known before the first backward
        pass, or each micro-batch would be normalised separately, and a mean of means weighs a token
        in a short batch more than one in a long batch. Three cases, all exact:

        - one micro-batch per process: forward, sum the counts over processes, backward;
        - several, but a single term: normalise by a provisional count and set the gradient right
          afterwards, since it is proportional to 1 / count;
        - several, and several terms with their own counts: a forward pass without gradients
          over all micro-batches finds the counts first. It draws the same random numbers, and costs
          about a quarter of the step. Keeping every graph until the counts are known would cost the
          memory that accumulation is there to save; a gradient per term would cost more time.
        """
        at_once, one_term = self.options.accumulate == 1, len(self.names) == 1
        scales = self.weights / _PROVISIONAL_COUNT
        if not at_once and not one_term:
            with torch.no_grad():
                passes = [self._forward(micro, step)[0] for micro in micros]
            scales = scales_of(self.weights, self._sum_counts(passes))
        outputs: list[list[LossOutput]] = []
        seen = None
        for number, micro in enumerate(micros):
            with self._adding(last=number == len(micros) - 1):
                found, out = self._summed_forward(micro, step)
                if at_once:
                    scales = scales_of(self.weights, self._sum_counts([found]))
                self._backward(found, scales)
            if keep:
                seen = Seen(out.map(Tensor.detach), micro.targets, micro.batch)
            outputs.append([_detached(o) for o in found])
            del found, out  # the graph, before the next one is built
        if not micros and isinstance(self.together, Together):
            if at_once:
                self._sum_counts([])
            self.scaler.scale(self.together.nothing()).backward()  # type: ignore[no-untyped-call]
        if not at_once and one_term:
            factor = _PROVISIONAL_COUNT / max(float(self._sum_counts(outputs)), 1e-9)
            for p in self.parameters:
                if p.grad is not None:
                    p.grad *= factor
        return outputs, seen

    @functools.cached_property
    def together(self) -> Together | Sharded | None:
        """Of several processes; not before the first step, since the trial is each process's own."""
        if self.workers.world_size == 1:
            return None
        if self.sharded:
            from kdrecipe.train.sharding import Sharded

            return Sharded(self.model, self.objective.module, self._forward, self.workers)
        return Together(self.model, self.objective.module, self._forward)

    def _summed_forward(self, micro: Micro, step: int) -> tuple[list[LossOutput], ModelOutput]:
        return (self.together.forward if self.together else self._forward)(micro, step)

    def _adding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return self.together.adding(last) if self.together else contextlib.nullcontext()

    def _add_penalty(self, penalty: Tensor) -> None:
        """Its gradient, which is the same on all processes: it is no sum over utterances."""
        if not penalty.requires_grad:
            return
        scaled: Tensor = self.scaler.scale(penalty)
        found = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        for p, grad in zip(self.parameters, found, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)

    def _backward(self, outputs: Sequence[LossOutput], scales: Tensor) -> None:
        loss = weighted_sum(outputs, scales)
        if loss is not None:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _sum_counts(self, passes: Sequence[Sequence[LossOutput]]) -> Tensor:
        counts = torch.zeros_like(self.weights)
        for outputs in passes:
            counts += count_vector(outputs, self.workers.device)
        return self.workers.sum(counts)

    def _micro(self, batch: Batch, slot: int, step: int = 0) -> Micro:
        device = self.workers.device
        moved = batch if device.type == "cpu" else batch.map(lambda x: x.to(device, non_blocking=True))
        number = slot * self.workers.world_size + self.workers.rank
        if not self.masked_teachers:
            targets = self.objective.targets(self.teachers, moved)
            return Micro(along_with(moved, targets), targets, number)
        num_views = self.objective.num_views
        features_BTF = self._augmented(moved, seed_step(self.seed, step, number))
        heard = replace(moved.repeat(num_views), features_BTF=features_BTF)
        targets = self.objective.targets(self.teachers, heard)
        if num_views > 1:
            _refuse_own_words(moved, targets)
        return Micro(along_with(moved, targets), targets, number, of_views=True)

    def _forward(self, micro: Micro, step: int) -> tuple[list[LossOutput], ModelOutput]:
        """The terms of a micro-batch; the same random numbers whenever asked."""
        number = seed_step(self.seed, step, micro.slot)
        repeated = micro.batch.repeat(self.objective.num_views)
        features_BTF = self._augmented(micro.batch, number)
        with self.autocast():
            out = self.model(
                features_BTF,
                repeated.lens_B,
                taps=self.objective.taps,
                batch=replace(repeated, features_BTF=features_BTF),
            )
        # Losses compute in float32: sums over frames lose too much in 8 or 11 bits.
        out = replace(out.map(full_precision), num_views=self.objective.num_views)
        found = self.objective.evaluate(out, micro.targets, micro.batch, micro.of_views)
        return (found if micro.counts else [LossOutput(o.total * 0, 0) for o in found]), out

    def _augmented(self, batch: Batch, number: int) -> Tensor:
        """Every view's features, masked on its own, one view after the other."""
        options, num_views = self.masks, self.objective.num_views
        if options is None or not self.masks_begun:
            return batch.repeat(num_views).features_BTF
        norm = getattr(self.model, "norm", None)
        fill_F = norm.mean_F if norm is not None else batch.features_BTF.new_zeros(())
        generator = torch.Generator().manual_seed(number)
        views = [
            spec_augment(batch.features_BTF, batch.lens_B, options, fill_F, generator)
            for _ in range(num_views)
        ]
        return views[0] if num_views == 1 else torch.cat(views)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The forward pass's precision."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.workers.device.type, self.dtype)

    # ------------------------------------------------------------ what can go wrong

    def _check_finite(
        self, norm: float, outputs: Sequence[Sequence[LossOutput]], batches: Sequence[Batch], step: int
    ) -> None:
        # The norm is that of the sum over processes, so all of them stop together.
        if math.isfinite(norm):
            self._overflows = 0
            return
        self._overflows += 1
        if self.scaler.is_enabled() and self._overflows < _MAX_OVERFLOWS:
            return
        values = self.values_of(outputs)
        bad = sorted({name for v in values for name, x in v.items() if not math.isfinite(x)})
        what = f"loss {', '.join(bad)}" if bad else "gradient"
        path = self.work_dir / f"nonfinite{self._of_rank}.pt"
        stop(f"the {what} is not finite", step, batches, values, path, self.options)

    def values_of(self, outputs: Sequence[Sequence[LossOutput]]) -> list[dict[str, float]]:
        """Value of each term by micro-batch of this process."""
        return [
            {
                name: float(o.total) / max(float(o.count), 1.0)
                for name, o in zip(self.names, found, strict=True)
            }
            for found in outputs
        ]

    def diverged(self, what: str, step: int) -> NoReturn:
        """Stop after ``step``, its batches saved; TrainingError."""
        path = self.work_dir / f"diverged{self._of_rank}.pt"
        batches, outputs = self._last
        stop(what, step, batches, self.values_of(outputs), path, self.options)

    @property
    def _of_rank(self) -> str:
        """In names of files that each process writes."""
        return "" if self.workers.is_first else f".rank{self.workers.rank}"


@contextlib.contextmanager
def memory_errors(batches: Sequence[Batch], options: Training) -> Iterator[None]:
    """Turn exhausted memory into an error that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
            error
        )
        if not known:
            raise
        shapes = ", ".join(f"{len(b)} utterances of up to {int(b.lens_B.max())} frames" for b in batches)
        raise TrainingError(
            f"not enough memory for a batch of {shapes}",
            where="training.batch_duration_s",
            remedy=f"lower it (now {options.batch_duration_s:g}) and raise training.accumulate (now "
            f"{options.accumulate}) by the same factor; or leave out the longest utterances",
        ) from error


def _detached(output: LossOutput) -> LossOutput:
    return replace(output, total=output.total.detach())


def _refuse_own_words(batch: Batch, targets: Mapping[str, Targets]) -> None:
    """Teachers may hear other words in each view, and a decoder follows one text."""
    named = [name for name, t in targets.items() if t.tokens_BU is not None]
    if named and not bool(batch.labelled_B.all()):
        raise TrainingError(
            f"{named[0]} hears other words in each masked view of an unlabelled utterance, and a student's "
            "decoder can follow one text only",
            where="targets.view",
            remedy="view: clean, or no loss that compares views (cr_ctc) beside losses along a text",
        )


def along_with(batch: Batch, targets: Mapping[str, Targets]) -> Batch:
    """The batch with the texts that its teachers' targets follow, so that the student follows them too.

    Labelled utterances have their transcripts there; the others stay unlabelled.

    Raises:
        TrainingError: two teachers follow different texts.
    """
    spoken = {name: t for name, t in targets.items() if t.tokens_BU is not None}
    if not spoken or bool(batch.labelled_B.all()):
        return batch
    first, *others = spoken.values()
    assert first.tokens_BU is not None
    assert first.token_lens_B is not None
    for other in others:
        assert other.tokens_BU is not None
        if not torch.equal(first.tokens_BU, other.tokens_BU):
            raise TrainingError(
                f"the teachers {' and '.join(spoken)} hear different words in an unlabelled utterance, and "
                "a student's decoder can follow one text only",
                where="training",
                remedy="give all but one of them a loss on frames (kl with head: ctc, hidden_mse)",
            )
    return replace(batch, tokens_BU=first.tokens_BU, token_lens_B=first.token_lens_B)
