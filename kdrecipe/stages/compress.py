"""Stage 6: prune and quantise, one bundle from another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import KdrecipeError, RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.carried import carry
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.load import Named, Recipe, System, Training
from kdrecipe.recipe.suitable import measured_exporter, unfit
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.corpus.audio import Utterance
    from kdrecipe.interfaces import Batch, CompressContext
    from kdrecipe.measure.budget import Found
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.plugin.registry import Registry
    from kdrecipe.stages.session import Session
    from kdrecipe.train.loop import TrainResult

NUM_CALIBRATION_BATCHES = 16


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per compressed system and seed."""
    from kdrecipe.stages.inputs import model_plugins, needs_of_training, system_inputs

    for name in recipe.build_order():
        system = recipe.systems[name]
        if system.kind != "compressed":
            continue
        learnt = recipe.objective_of(name)
        for seed in system.seeds:
            assert system.parent is not None
            parent = f"{system.parent}/seed{recipe.seed_of(system.parent, seed)}"
            inputs = {
                "steps": [{"name": s.name, **s.options} for s in system.steps],
                "plugins": model_plugins(recipe, name),
                "training": dict(system_inputs(recipe, learnt)) if learnt else None,
                "fine_tuning": system.training.model_dump(mode="json"),
                **_budget_inputs(recipe, system),
            }
            needs = needs_of_training(plan, recipe, learnt, seed) if learnt else ("features", "tokens")
            plan.add(
                Job(
                    6,
                    f"{name}/seed{seed}",
                    layout.system(name, seed),
                    inputs,
                    partial(run, recipe, layout, system, seed),
                    tuple(dict.fromkeys((parent, *needs))),
                    resumable=True,
                    alone=False,
                    together=True,
                )
            )


def fine_tuning(training: Training, epochs: int) -> Training:
    """The system's settings for so many epochs: a compressor goes by the share of steps done."""
    fixed = "linear" if training.schedule == "wsd" else training.schedule
    return training.model_copy(update={"epochs": epochs, "schedule": fixed, "flat_start": 0})


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Apply the steps in order; one that trains does so with the losses of the system or of its parent."""
    from kdrecipe.model.bundle import Bundle, provenance
    from kdrecipe.train.distribution import is_first, is_several, local_device

    assert system.parent is not None
    registry = recipe.plugins.registry
    parent = Bundle.load(layout.system(system.parent, recipe.seed_of(system.parent, seed)), registry)
    if system.budget and system.budget.measure == "rtf" and is_several():
        raise KdrecipeError(
            "a budget of time is measured, and processes that train together would each find their own",
            where=system.name,
            remedy="run stage 6 without --nproc",
        )
    session, context = _session(recipe, layout, system, seed)
    scales = _Scales(recipe, layout, system, parent) if system.budget else None
    found = scales.meet(context) if scales else None
    steps = scales.steps(found.strength) if scales and found else system.steps
    results: list[TrainResult] = []

    def train(model: Any, compressor: Any, number: int) -> None:
        _refuse_other_tokens(recipe, system, parent.meta["vocab_id"], session)
        training = fine_tuning(system.training, compressor.num_epochs)
        place = out / "train" / f"step{number}"
        penalty = getattr(compressor, "penalty", None)
        results.append(session.run(model, place, training, on_step=compressor.on_step, penalty=penalty))

    model, done = _applied(registry, parent.model.to(local_device()), steps, context, train)
    if not is_first():
        return
    model = model.to("cpu")
    effort = results[-1].summary() if results else None
    made = provenance(recipe.command, recipe=recipe.name, seconds=effort.pop("seconds") if effort else 0)
    meta = {
        **_meta(parent, system, done),
        "seed": seed,
        **({"budget": scales.record(found, scales.cost(model, done))} if scales and found else {}),
        "training": effort,
        # Not the parent's copies: the recipe's ran here, and two states of one file exclude each other.
        "plugin_files": carry(recipe.plugin_files, out),
    }
    Bundle.save(out, model, parent.tokens, meta, made)
    for checkpoints in out.glob("train/*/checkpoints"):
        shutil.rmtree(checkpoints)


def _meta(parent: Bundle, system: System, done: list[dict[str, Any]]) -> dict[str, Any]:
    """What a bundle says of itself and its steps."""
    return {
        **{k: parent.meta[k] for k in ("model", "features")},
        "name": system.name,
        "kind": "compressed",
        "parent": system.parent,
        "compression": [*parent.meta["compression"], *done],
    }


def _applied(
    registry: Registry,
    model: Any,
    steps: Sequence[Named],
    context: CompressContext,
    train: Callable[[Any, Any, int], None] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """The model after all steps, and what a bundle keeps of each.

    Args:
        registry: of the compressors.
        model: may be changed in place.
        steps: compressors with their options.
        context: for them.
        train: called with model, compressor and number of each step that trains; None: none does.
    """
    from torch import nn

    from kdrecipe.model.bundle import build_compressor, compressor_state

    done = []
    for number, step in enumerate(steps):
        spec = {"name": step.name, "options": step.options}
        compressor = build_compressor(registry, spec)
        model = returned(compressor.apply(model, context), nn.Module, f"compressor {step.name!r}", "apply")
        if compressor.num_epochs and train is not None:
            train(model, compressor, number)
        model = returned(compressor.finish(model), nn.Module, f"compressor {step.name!r}", "finish").eval()
        state = compressor_state(step.name, compressor)
        done.append({**spec, "report": compressor.report(), "state": state})
    return model, done


class _Scales:
    """What models cost that come of a system's steps, by its budget."""

    def __init__(self, recipe: Recipe, layout: Layout, system: System, parent: Bundle) -> None:
        from kdrecipe.corpus.audio import utterances_from_cuts
        from kdrecipe.corpus.subsets import drawn_over_speakers
        from kdrecipe.data.features import tuning_cuts
        from kdrecipe.measure.budget import NUM_UTTERANCES

        assert system.budget is not None
        self.registry, self.system, self.parent = recipe.plugins.registry, system, parent
        self.budget = system.budget
        self.where = recipe.document.where(("systems", system.name, "compress", "budget"))
        exported = self.budget.measure in ("size_mb", "rtf")
        self.exporter = _measured(recipe, parent, self.where) if exported else None
        self.sample: list[Utterance] = []
        if self.budget.measure == "rtf":
            cuts = drawn_over_speakers(tuning_cuts(layout.features), NUM_UTTERANCES)
            self.sample = list(utterances_from_cuts(cuts))

    def cost(self, model: Any, done: list[dict[str, Any]]) -> float:
        """Of a model after the steps ``done``, as a bundle of the system's name."""
        from kdrecipe.measure.budget import cost_of
        from kdrecipe.model.bundle import Bundle

        with tempfile.TemporaryDirectory() as scratch:
            meta = {**_meta(self.parent, self.system, done), "plugin_files": {}}
            Bundle.save(Path(scratch), model, self.parent.tokens, meta)
            bundle = Bundle.load(scratch, self.registry)
            return cost_of(bundle, self.budget.measure, self.exporter, self.sample)

    def steps(self, strength: float) -> tuple[Named, ...]:
        """The system's steps, those that are free with this strength."""
        steps = list(self.system.steps)
        for number in self.system.free_steps:
            option = self.registry.get("compressors", steps[number].name).strength
            options = {**steps[number].options, option: round(strength, 6)}
            steps[number] = replace(steps[number], options=options)
        return tuple(steps)

    def record(self, found: Found, value: float) -> dict[str, Any]:
        """What a bundle keeps: the finished model has a shape of its own where that is learnt."""
        limit = {"measure": self.budget.measure, "limit": self.budget.limit}
        return {**limit, **asdict(found), "value": value}

    def meet(self, context: CompressContext) -> Found:
        """The strength that meets the budget, by models that are not trained."""
        import copy

        from kdrecipe.measure.budget import meet

        def cost(strength: float) -> float:
            model = copy.deepcopy(self.parent.model).to(context.device)
            return self.cost(*_applied(self.registry, model, self.steps(strength), context))

        found = meet(cost, self.budget.limit, self.budget.measure, self.where)
        print(
            f"  {self.system.name}: {self.budget.measure} {found.value:.6g} of {self.budget.limit:.6g} at "
            f"strength {found.strength:.4g}, {found.trials} models tried",
            flush=True,
        )
        return found


def _measured(recipe: Recipe, parent: Bundle, where: str) -> Any:
    """The exporter whose files the budget is about."""
    heads = list(parent.meta["model"]["heads"])
    wanted = measured_exporter(heads, recipe.export, recipe.plugins.registry)
    why = "no exporter of the recipe is" if wanted is None else None
    if wanted is not None:
        why = unfit(recipe.plugins.registry, wanted.name, parent.meta["model"])
    if wanted is None or why is not None:
        raise RecipeError(
            f"a budget of size or time is of the exported model: {why} for the head {heads[0]!r}",
            where=where,
            remedy="a budget of params or macs_per_s needs no export",
        )
    cls = recipe.plugins.registry.get("exporters", wanted.name)
    return cls(cls.Config.model_validate(wanted.options))


def _budget_inputs(recipe: Recipe, system: System) -> dict[str, Any]:
    """What the result depends on if a budget decides the strength."""
    if system.budget is None:
        return {}
    registry, heads = recipe.plugins.registry, recipe.heads_of(system.name)
    wanted = measured_exporter(heads, recipe.export, registry) if heads else None
    exporter = wanted and {**asdict(wanted), "plugin": registry.fingerprint("exporters", wanted.name)}
    exports = exporter if system.budget.measure in ("size_mb", "rtf") else None
    limit = [system.budget.measure, system.budget.limit]
    return {"budget": {"limit": limit, "free_steps": system.free_steps, "exporter": exports}}


def _session(recipe: Recipe, layout: Layout, system: System, seed: int) -> tuple[Session, CompressContext]:
    """What the steps train with, and what they may ask for."""
    from kdrecipe.interfaces import CompressContext
    from kdrecipe.stages.session import Session
    from kdrecipe.train.distribution import local_device

    learnt, device = recipe.objective_of(system.name), local_device()
    session = Session(recipe, layout, learnt or system, seed)

    def calibration() -> Iterator[Batch]:
        return (b.map(lambda x: x.to(device)) for b in session.calibration(NUM_CALIBRATION_BATCHES))

    def gradients(model: Any) -> Iterator[Batch]:
        return session.gradients(model, NUM_CALIBRATION_BATCHES)

    def evaluate(model: Any) -> float:
        return session.token_errors(model)

    context = CompressContext(calibration, seed, str(device), evaluate=evaluate)
    return session, replace(context, gradients=gradients) if learnt else context


def _refuse_other_tokens(recipe: Recipe, system: System, vocab_id: str, session: Session) -> None:
    """A bundle from elsewhere can be trained on the recipe's tokens only."""
    if vocab_id != session.tokens.vocab_id:
        raise RecipeError(
            f"{system.parent!r} counts in other tokens than those that the recipe makes of its corpus",
            where=recipe.document.where(("systems", system.name, "compress")),
            remedy="set tokens and data as they were for the bundle, or choose steps without training",
        )
