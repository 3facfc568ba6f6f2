"""The one training loop: teachers, students, and fine-tuning under compression.

What depends on what: an epoch's batches on (seed, epoch), a step's random numbers on (seed, step).
So a killed run resumes from its last checkpoint as if nothing had happened, on a CPU
bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdrecipe.artifacts import fingerprint
from kdrecipe.data.batches import CutBatches
from kdrecipe.errors import TrainingError
from kdrecipe.targets import TargetSource
from kdrecipe.train.average import WeightAverage
from kdrecipe.train.checkpoints import Checkpoints
from kdrecipe.train.distribution import Workers
from kdrecipe.train.divergence import Divergence, fell_silent
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.evaluation import DevScore, evaluate
from kdrecipe.train.flat_start import with_flat_start
from kdrecipe.train.log import Progress, TrainLog, normalised
from kdrecipe.train.objective import Objective, Term, has_begun
from kdrecipe.train.optimisation import (
    Cooldown,
    OptimizerHook,
    cooldown_reason,
    last_epoch,
    lr_factor,
    make_optimizer,
    set_lr,
    wsd_factor,
)
from kdrecipe.train.step import Seen, Stepper

if TYPE_CHECKING:
    from kdrecipe.interfaces import Batch
    from kdrecipe.recipe.sections import Training

__all__ = ["Objective", "Term", "TrainResult", "train"]

MetricsHook = Callable[..., Iterable[Mapping[str, float]]]
"""``hook(step=, student=ModelOutput, teacher={name: Targets}, batch=Batch)``, from every plugin."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run.

    Args:
        steps: optimiser steps.
        epochs: passes over the data.
        seconds: time spent training, interruptions not counted.
        audio_s: seconds of audio seen.
        dev_loss: of the averaged weights, supervised terms; None without dev data or such terms.
        dev_ter: of the averaged weights, token error rate; None without dev data or CTC head.
        best_epoch: with the lowest dev token error rate (from 1), or None.
        best_dev_ter: that rate.
        stopped: why the run ended when it did: ``flat`` (the dev error had stopped falling), ``bound``
            (``epochs`` ended it while the error was still falling), ``no dev`` (nothing told) or ``schedule``
            (of a fixed length).
        cooldown_epoch: after this one the learning rate fell to 0; None under a fixed schedule.
        precision: type of the matrix products.
        history: one entry per epoch, as in ``log.jsonl``.
    """

    steps: int
    epochs: int
    seconds: float
    audio_s: float
    dev_loss: float | None
    dev_ter: float | None
    best_epoch: int | None
    best_dev_ter: float | None
    stopped: str
    cooldown_epoch: int | None
    precision: str
    history: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything but the history, JSON-like."""
        return {k: v for k, v in asdict(self).items() if k != "history"}


def train(
    model: nn.Module,
    batches: CutBatches,
    objective: Objective,
    teachers: Mapping[str, TargetSource],
    options: Training,
    work_dir: Path,
    *,
    seed: int,
    dev: CutBatches | None = None,
    on_step: Callable[[nn.Module, int, int], None] | None = None,
    penalty: Callable[[nn.Module, int, int], Tensor] | None = None,
    progress: bool = True,
    label: str = "",
    build_optimizer: OptimizerHook | None = None,
    train_metrics: MetricsHook | None = None,
    device: str | None = None,
    masked_teachers: bool = False,
) -> TrainResult:
    """Train ``model`` in place; on return it holds the running average of its weights.

    An unfinished run in ``work_dir`` resumes from its last checkpoint, provided that it
    was started with the same data, options and model; another one's checkpoints are discarded.

    Args:
        model: a :class:`kdrecipe.model.asr.AsrModel`, initialised.
        batches: training data.
        objective: what is minimised.
        teachers: by the names that the objective's terms use.
        options: the recipe's ``training``.
        work_dir: gets ``log.jsonl`` and ``checkpoints/``.
        seed: of augmentation and dropout (the order of the data has ``batches.seed``).
        dev: scored every ``dev_every`` epochs.
        on_step: called with (model, step, num_steps) after every optimiser step, step from 1; num_steps is
            the most that there can be.
        penalty: added to the loss of each step; called with (model, step, num_steps), too.
        progress: whether to say anything on standard error.
        label: what is being trained, for those lines.
        build_optimizer: see :data:`kdrecipe.train.optimisation.OptimizerHook`.
        train_metrics: see :data:`MetricsHook`.
        device: None takes the GPU if there is one.
        masked_teachers: teachers hear the student's own input, with its masks, in each of its views.

    Raises:
        TrainingError: nothing to learn from, not enough memory, or a loss that is not finite.
    """
    if objective.supervised_only and batches.num_labelled == 0:
        raise TrainingError(
            "nothing to learn from: all losses need labels and no utterance has any",
            remedy="give the system labelled data, or a loss that learns from a teacher",
        )
    workers = Workers.from_environment(device)
    most_steps = options.epochs * batches.num_batches(0) // (options.accumulate * workers.world_size)
    objective = with_flat_start(objective, min(options.flat_start, most_steps // 4))
    objective.labelled_share = batches.num_labelled / len(batches)
    model.to(workers.device).train()
    objective.module.to(workers.device).train()
    workers.share_state([*model.state_dict().values(), *objective.module.state_dict().values()])
    for average in _averages(teachers).values():
        average.start(model)  # type: ignore[arg-type]
    given = model
    if options.shard and workers.world_size > 1:
        from kdrecipe.train.sharding import shard

        _check_shard(teachers, on_step)
        model = copy.deepcopy(model)
        given.to("cpu")
        shard(model, workers)
    num_params = sum(p.numel() for p in model.parameters())
    options = options.for_model(num_params, objective.num_views)
    others = [p for _, p in objective.named_parameters()]
    optimizer = make_optimizer(model, others, options, build_optimizer)
    stepper = Stepper(model, objective, teachers, optimizer, options, workers, seed, work_dir)
    stepper.masked_teachers = masked_teachers
    run = _Run(stepper, batches, dev, work_dir, seed)
    if penalty is not None:
        stepper.penalty = lambda step: penalty(model, step, run.num_steps)
    run.on_step, run.train_metrics, run.show_progress, run.label = on_step, train_metrics, progress, label
    run.resume()
    if run.epoch < run.last_epoch:
        stepper.try_out(run.longest())
    try:
        while run.epoch < run.last_epoch:
            run.do_epoch()
    finally:
        run.progress.close()
    result = run.finish()
    if model is not given:
        from kdrecipe.train.sharding import whole

        given.load_state_dict(whole(model.state_dict()))
        given.eval()
    return result


def _check_shard(teachers: Mapping[str, TargetSource], on_step: object) -> None:
    """Refuse to divide a model that something else reads whole."""
    reader = "teachers: [ema]" if _averages(teachers) else "a compressor" if on_step else None
    if reader:
        raise TrainingError(
            f"{reader} needs the model's weights whole",
            where="training.shard",
            remedy="shard: false for this system: then each process has all of it",
        )


def _averages(teachers: Mapping[str, TargetSource]) -> dict[str, MovingAverage]:
    """Teachers that follow the student."""
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, MovingAverage)}


class _Run:
    """A run: its position, its counters, what it writes."""

    def __init__(
        self, stepper: Stepper, batches: CutBatches, dev: CutBatches | None, work_dir: Path, seed: int
    ) -> None:
        self.stepper = stepper
        self.options = stepper.options
        self.workers = stepper.workers
        self.batches = batches
        self.dev = dev
        self.seed = seed
        self.on_step: Callable[[nn.Module, int, int], None] | None = None
        self.train_metrics: MetricsHook | None = None
        self.show_progress = True
        self.label = ""
        self.checkpoints = Checkpoints(work_dir)
        self.average = WeightAverage(stepper.model) if self.options.average else None
        self.following = _averages(stepper.teachers)
        self.log = TrainLog(work_dir / "log.jsonl", self.workers.is_first)
        # A step takes this many batches of the plan, all processes together; the last step of an
        # epoch what is left.
        self.group = self.options.accumulate * self.workers.world_size
        self.epoch_steps: list[int] = []
        self.num_steps = 0
        """Of the whole run; until it is known when a run with ``schedule: wsd`` ends, the most it can be."""
        self.cooldown: Cooldown | None = None
        self.scenes_begun = self.options.augment is not None
        self.epoch = self.index = self.step = 0  # epochs and steps done; steps done in this epoch
        self.seconds = self.audio_s = self.interval_audio_s = self.interval_s = 0.0
        self.divergence = Divergence()
        self.facts = ""
        self.history: list[dict[str, Any]] = []

    def _expect(self, epoch_steps: list[int] | None) -> None:
        """So many steps in each epoch that there can be; None: to be counted, which takes a while for a
        million utterances, so checkpoints know it."""
        if epoch_steps is None:
            epochs = range(self.options.epochs)
            epoch_steps = [-(-self.batches.num_batches(epoch) // self.group) for epoch in epochs]
        self.epoch_steps, self.num_steps = epoch_steps, sum(epoch_steps)
        self.stepper.objective.num_steps = self.num_steps
        # in a short run, no more than a tenth
        self.warmup_steps = min(self.options.warmup_steps, max(1, self.num_steps // 10))

    @property
    def last_epoch(self) -> int:
        """The epoch that ends the run, as far as is known."""
        return self.cooldown.last_epoch if self.cooldown else self.options.epochs

    # ------------------------------------------------------------ going through the data

    def do_epoch(self) -> None:
        """What is left of the current epoch, then its checkpoint and dev scores."""
        self._begin()
        plan = self.batches.epoch(self.epoch)
        saved_at = time.monotonic()
        num_steps = -(-len(plan) // self.group)
        for number in range(self.index, num_steps):
            self._do_step(plan[number * self.group : (number + 1) * self.group])
            due = time.monotonic() - saved_at >= self.options.checkpoint_every_s
            if self.index < num_steps and self.workers.agree_on(due):
                self._save()
                saved_at = time.monotonic()
        self.epoch, self.index = self.epoch + 1, 0
        entry: dict[str, Any] = {"step": self.step, "epoch": self.epoch}
        if self.dev and (self.epoch % self.options.dev_every == 0 or self.epoch == self.last_epoch):
            score = self._evaluate(self.dev)
            entry |= {"dev_loss": score.loss, "dev_ter": score.ter, "dev_said": score.said}
        entry |= {"seconds": round(self.seconds, 2), "audio_s": round(self.audio_s, 2)}
        self.history.append(entry)
        self.log.write("epoch", entry)
        if fell_silent(self.history):
            self.stepper.diverged("the model has fallen silent: it says next to nothing on dev", self.step)
        if self.options.schedule == "wsd" and self.cooldown is None:
            self._end_in_time()
        self._save()
        if entry.get("dev_ter") is not None:
            self.progress.note(f"epoch {self.epoch} dev_ter {entry['dev_ter']:.2%}")

    def _evaluate(self, dev: CutBatches) -> DevScore:
        if self.average is None:
            return evaluate(self.stepper, dev)
        with self.average.in_place():
            return evaluate(self.stepper, dev)

    def _end_in_time(self) -> None:
        """Begin the cool-down if it is due; from here on it is known when the run ends."""
        reason = cooldown_reason(self.history, self.options)
        if reason is None:
            return
        last = last_epoch(self.epoch, reason, self.options)
        steps = sum(self.epoch_steps[self.epoch : last])
        self.cooldown = Cooldown(self.epoch, last, self.step, steps, reason)
        self.num_steps = self.step + steps
        self.progress.expect(self.num_steps)
        why = {
            "flat": "the dev error is flat",
            "bound": "still improving, but training.epochs is near",
            "no dev": "training.epochs is near",
        }
        self.progress.say(
            f"epoch {self.epoch}: {why[reason]}; the learning rate falls to 0 until epoch {last}"
        )

    def _lr_factor(self, step: int) -> float:
        if self.options.schedule == "wsd":
            return wsd_factor(step, self.warmup_steps, self.cooldown)
        return lr_factor(step, self.num_steps, self.warmup_steps, self.options.schedule)

    def _begin(self) -> None:
        """Masks, scenes and losses that wait for the model to have left the plateau of blanks."""
        if not self.dev:
            return
        lowest = min((e["dev_ter"] for e in self.history if e.get("dev_ter") is not None), default=None)
        masks, augment = self.stepper.masks, self.options.augment
        self.stepper.masks_begun = masks is not None and has_begun(masks.start_below, lowest)
        self.scenes_begun = augment is not None and has_begun(augment.start_below, lowest)
        self.stepper.objective.begin([(e["step"], e.get("dev_ter")) for e in self.history])

    def longest(self) -> Batch:
        """The batch that needs the most memory."""
        ids = self.batches.longest()
        if self.options.augment is None:
            return self.batches.load(ids)
        return self.batches.load_augmented(ids, (self.seed,))

    def _load(self, ids: list[str], step: int, slot: int) -> Batch:
        if not self.scenes_begun:
            return self.batches.load(ids)
        return self.batches.load_augmented(ids, (self.seed, step, slot, self.workers.rank))

    def _do_step(self, group: list[list[str]]) -> None:
        began = time.monotonic()
        mine = group[self.workers.rank :: self.workers.world_size]
        step = self.step + 1
        logs = step % self.options.log_every == 0 or step == self.num_steps
        lr = set_lr(self.stepper.optimizer, self._lr_factor(step))
        loaded = [self._load(ids, step, slot) for slot, ids in enumerate(mine)]
        short = -(-len(group) // self.workers.world_size) - len(mine) if self.stepper.sharded else 0
        idle = [self._load(group[0], step, 0) for _ in range(short)]
        keep = logs and self.train_metrics is not None
        norm, seen = self.stepper.run(loaded, step, keep, idle)
        self.step, self.index = step, self.index + 1
        if self.on_step:
            self.on_step(self.stepper.model, step, self.num_steps)
        if self.average is not None:
            self.average.update(step)
        for teacher in self.following.values():
            teacher.update()
        audio_s = sum(self.batches.duration_s(ids) for ids in group)
        self.audio_s += audio_s
        self.interval_audio_s += audio_s
        spent_s = time.monotonic() - began
        self.seconds += spent_s
        self.interval_s += spent_s
        if logs:
            self._write_log(lr, norm, seen)
        self.progress.step(step, self.facts)

    def _write_log(self, lr: float, norm: float, seen: Seen | None) -> None:
        numbers = self.workers.sum_numbers(self.stepper.meter.numbers())
        objective = self.stepper.objective
        staying = zip(objective.terms, objective.weights, strict=True)
        weights = {term.name: weight for term, weight in staying if term.fade_steps is None}
        loss, terms, metrics = normalised(numbers, weights)
        if seen is not None and self.train_metrics is not None:
            with torch.no_grad():
                found = self.train_metrics(
                    step=self.step, student=seen.student, teacher=seen.targets, batch=seen.batch
                )
            for more in found:
                metrics |= {name: float(value) for name, value in more.items()}
        speed = self.interval_audio_s / max(self.interval_s, 1e-9)
        entry = {"step": self.step, "epoch": self.epoch + 1, "loss": loss, "terms": terms, "metrics": metrics}
        if name := self.divergence.look(terms):
            self.stepper.diverged(f"the loss {name} has exploded ({terms[name]:.3g})", self.step)
        self.log.write("step", {**entry, "lr": lr, "grad_norm": norm, "audio_s_per_s": round(speed, 1)})
        shown = "-" if loss is None else f"{loss:.3f}"
        self.facts = f"epoch {self.epoch + 1} loss {shown} lr {lr:.1e} {speed:.0f} audio-s/s"
        if self.history and self.history[-1].get("dev_ter") is not None:
            self.facts += f" dev_ter {self.history[-1]['dev_ter']:.2%}"
        self.stepper.meter.clear()
        self.interval_audio_s = self.interval_s = 0.0

    def finish(self) -> TrainResult:
        """Average, score, and describe the run."""
        if self.average is not None:
            self.average.apply()
        last = self.history[-1]  # scored with the same weights
        scored = [e for e in self.history if e.get("dev_ter") is not None]
        best = min(scored, key=lambda e: float(e["dev_ter"]), default=None)
        result = TrainResult(
            steps=self.step,
            epochs=self.epoch,
            seconds=round(self.seconds, 2),
            audio_s=round(self.audio_s, 2),
            dev_loss=last.get("dev_loss"),
            dev_ter=last.get("dev_ter"),
            best_epoch=best["epoch"] if best else None,
            best_dev_ter=best["dev_ter"] if best else None,
            stopped=self.cooldown.reason if self.cooldown else "schedule",
            cooldown_epoch=self.cooldown.after_epoch if self.cooldown else None,
            precision=str(self.stepper.dtype or torch.float32).removeprefix("torch."),
            history=self.history,
        )
        self.log.rewind(self.step)  # a run killed between its end and its bundle says it only once
        self.log.write("end", result.summary() | {"step": self.step})
        self.stepper.model.eval()
        return result

    # ------------------------------------------------------------ checkpoints

    def resume(self) -> None:
        """Resume an unfinished run of the same kind, if there is one."""
        state = self.checkpoints.load()
        signature = self._signature()
        if state and state["signature"] != signature:
            changed = sorted(k for k, v in signature.items() if state["signature"].get(k) != v)
            self.progress = Progress(self.label, 0, 0, self._talks)
            self.progress.say(f"starting from the beginning: the checkpoint's {', '.join(changed)} differ")
            self.workers.wait()  # all have read it
            if self.workers.is_first:
                self.checkpoints.clear()
            state = None
        self._expect(state.get("epoch_steps") if state else None)
        if state:
            self._restore(state)
        self.log.rewind(self.step)
        self.progress = Progress(self.label, self.num_steps, self.step, self._talks)
        self.progress.expect(self.num_steps, self.options.schedule == "wsd" and self.cooldown is None)
        if state:
            self.progress.say(f"resuming after step {self.step}")

    @property
    def _talks(self) -> bool:
        return self.show_progress and self.workers.is_first

    def _signature(self) -> dict[str, str]:
        """What must agree for a checkpoint to be resumed."""
        # how often dev is scored decides when a run ends, unless its length is fixed
        ignored = {"log_every", "checkpoint_every_s"}
        if self.options.schedule != "wsd":
            ignored.add("dev_every")
        options = {k: v for k, v in self.options.model_dump(mode="json").items() if k not in ignored}
        shapes = {name: list(p.shape) for name, p in self.stepper.model.state_dict().items()}
        masked = self.stepper.masked_teachers
        decays = {name: t.decay for name, t in self.following.items()}
        terms = [
            (t.name, t.weight, t.teachers, t.start_below, t.fade_steps) for t in self.stepper.objective.terms
        ]
        plan = [self.batches.digest, self.batches.seed, self.batches.num_labelled, self.group]
        return {
            "seed": str(self.seed),
            "options": fingerprint(options),
            "model": fingerprint(shapes),
            "losses": fingerprint([terms, decays, masked] if decays or masked else terms),
            "data": fingerprint(plan),
            "number of processes": str(self.workers.world_size),
        }

    def _save(self) -> None:
        if self.workers.world_size > 1:  # a collective operation: before rank 0 continues alone
            numbers = self.workers.sum_numbers(self.stepper.meter.numbers())
        else:
            numbers = self.stepper.meter.numbers()
        model, optimizer = self.stepper.model.state_dict(), self.stepper.optimizer.state_dict()
        average = self.average.state_dict() if self.average else None
        if self.stepper.sharded:  # likewise
            from kdrecipe.train.sharding import whole

            model, optimizer, average = whole(model), whole(optimizer), whole(average)
        if not self.workers.is_first:
            return
        self.checkpoints.save(
            {
                "signature": self._signature(),
                "position": [self.epoch, self.index, self.step],
                "clocks": [self.seconds, self.audio_s, self.interval_s, self.interval_audio_s],
                "model": model,
                "losses": self.stepper.objective.module.state_dict(),
                "optimizer": optimizer,
                "scaler": self.stepper.scaler.state_dict(),
                "average": average,
                "teachers": {name: t.state_dict() for name, t in self.following.items()},
                "meter": numbers,
                "divergence": self.divergence.state_dict(),
                "history": self.history,
                "epoch_steps": self.epoch_steps,
                "cooldown": asdict(self.cooldown) if self.cooldown else None,
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.index, self.step = state["position"]
        self.seconds, self.audio_s, self.interval_s, self.interval_audio_s = state["clocks"]
        model, optimizer, average = state["model"], state["optimizer"], state["average"]
        if self.stepper.sharded:
            from kdrecipe.train.sharding import divided, divided_optimizer

            model = divided(model, self.stepper.model.state_dict())
            optimizer = divided_optimizer(optimizer, self.stepper.optimizer)
            average = average and self.average and divided(average, self.average.state_dict())
        self.stepper.model.load_state_dict(model)
        self.stepper.objective.module.load_state_dict(state["losses"])
        self.stepper.optimizer.load_state_dict(optimizer)
        self.stepper.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(average)
        for name, teacher in self.following.items():
            teacher.load_state_dict(state["teachers"][name])
        self.history = state["history"]
        if "divergence" in state:
            self.divergence.load_state_dict(state["divergence"])
        if state["cooldown"]:
            self.cooldown = Cooldown(**state["cooldown"])
            self.num_steps = self.cooldown.from_step + self.cooldown.num_steps
        if self.workers.is_first:  # the sums are those of all processes
            self.stepper.meter.load(state["meter"])
