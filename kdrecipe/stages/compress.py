"""Stage 6: prune and quantise, one bundle from another."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.carried import carry
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.load import Recipe, System, Training
from kdrecipe.stages.layout import Layout

NUM_CALIBRATION_BATCHES = 16


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per compressed system and seed."""
    from kdrecipe.stages.codebooks import jobs_of
    from kdrecipe.stages.inputs import model_plugins, system_inputs

    for name in recipe.build_order():
        system = recipe.systems[name]
        if system.kind != "compressed":
            continue
        trained = recipe.trained_ancestor(name)
        for seed in system.seeds:
            assert system.parent is not None
            parent = f"{system.parent}/seed{recipe.seed_of(system.parent, seed)}"
            inputs = {
                "steps": [{"name": s.name, **s.options} for s in system.steps],
                "plugins": model_plugins(recipe, name),
                "training": dict(system_inputs(recipe, trained)) if trained else None,
                "fine_tuning": system.training.model_dump(mode="json"),
            }
            taught = [(t, recipe.seed_of(t, seed)) for t in (trained.teachers if trained else ())]
            named = [f"targets/{t}/seed{its_seed}" for t, its_seed in taught]
            targets = [job for job in named if job in plan.jobs] + jobs_of(plan, taught)
            plan.add(
                Job(
                    6,
                    f"{name}/seed{seed}",
                    layout.system(name, seed),
                    inputs,
                    partial(run, recipe, layout, system, seed),
                    (parent, "features", "tokens", *targets),
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
    """Apply the steps in order; a step that fine-tunes does so with its ancestor's own objective."""
    from torch import nn

    from kdrecipe.interfaces import CompressContext
    from kdrecipe.model.bundle import Bundle, build_compressor, compressor_state, provenance
    from kdrecipe.stages.session import Session
    from kdrecipe.train.distribution import is_first

    assert system.parent is not None
    registry = recipe.plugins.registry
    parent = Bundle.load(layout.system(system.parent, recipe.seed_of(system.parent, seed)), registry)
    trained = recipe.trained_ancestor(system.name)
    session = Session(recipe, layout, trained or system, seed)
    model: Any = parent.model
    done = list(parent.meta["compression"])
    context = CompressContext(lambda: session.calibration(NUM_CALIBRATION_BATCHES), seed)
    result = None
    for number, step in enumerate(system.steps):
        spec = {"name": step.name, "options": step.options}
        compressor = build_compressor(registry, spec)
        model = returned(compressor.apply(model, context), nn.Module, f"compressor {step.name!r}", "apply")
        if compressor.num_epochs:
            training = fine_tuning(system.training, compressor.num_epochs)
            result = session.run(model, out / "train" / f"step{number}", training, on_step=compressor.on_step)
            model.to("cpu")  # where calibration batches are
        model = returned(compressor.finish(model), nn.Module, f"compressor {step.name!r}", "finish").eval()
        state = compressor_state(step.name, compressor)
        done.append({**spec, "report": compressor.report(), "state": state})
    if not is_first():
        return
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
    Bundle.save(out, model, parent.tokens, meta, made)
    for checkpoints in out.glob("train/*/checkpoints"):
        shutil.rmtree(checkpoints)
