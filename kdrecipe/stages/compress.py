"""Stage 6: prune and quantise, one bundle from another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.errors import RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.carried import carry
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.load import Recipe, System, Training
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.interfaces import Batch, CompressContext
    from kdrecipe.stages.session import Session

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
                )
            )


def fine_tuning(training: Training, epochs: int) -> Training:
    """The system's settings for so many epochs: a compressor goes by the share of steps done."""
    fixed = "linear" if training.schedule == "wsd" else training.schedule
    return training.model_copy(update={"epochs": epochs, "schedule": fixed, "flat_start": 0})


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Apply the steps in order; one that trains does so with the losses of the system or of its parent."""
    from torch import nn

    from kdrecipe.model.bundle import Bundle, build_compressor, compressor_state, provenance
    from kdrecipe.train.distribution import local_device

    assert system.parent is not None
    registry = recipe.plugins.registry
    parent = Bundle.load(layout.system(system.parent, recipe.seed_of(system.parent, seed)), registry)
    session, context = _session(recipe, layout, system, seed)
    model: Any = parent.model.to(local_device())
    done = list(parent.meta["compression"])
    result = None
    for number, step in enumerate(system.steps):
        spec = {"name": step.name, "options": step.options}
        compressor = build_compressor(registry, spec)
        model = returned(compressor.apply(model, context), nn.Module, f"compressor {step.name!r}", "apply")
        if compressor.num_epochs:
            _refuse_other_tokens(recipe, system, parent.meta["vocab_id"], session)
            training = fine_tuning(system.training, compressor.num_epochs)
            result = session.run(model, out / "train" / f"step{number}", training, on_step=compressor.on_step)
        model = returned(compressor.finish(model), nn.Module, f"compressor {step.name!r}", "finish").eval()
        state = compressor_state(step.name, compressor)
        done.append({**spec, "report": compressor.report(), "state": state})
    effort = result.summary() if result else None
    made = provenance(recipe.command, recipe=recipe.name, seconds=effort.pop("seconds") if effort else 0)
    meta = {
        **{k: parent.meta[k] for k in ("model", "features")},
        "name": system.name,
        "kind": "compressed",
        "parent": system.parent,
        "seed": seed,
        "compression": done,
        "training": effort,
        # Not the parent's copies: the recipe's ran here, and two states of one file exclude each other.
        "plugin_files": carry(recipe.plugin_files, out),
    }
    Bundle.save(out, model.to("cpu"), parent.tokens, meta, made)
    for checkpoints in out.glob("train/*/checkpoints"):
        shutil.rmtree(checkpoints)


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
