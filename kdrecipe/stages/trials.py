"""``--trials``: the students of a recipe with the options that it states and with others, compared on dev.

Stages 0 to 3 are the recipe's own. Targets and students follow in a folder of their own, one seed of each.
Then each bundle recognises dev with its main search. Nothing is exported, no other split is looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json, write_atomic, write_json
from kdrecipe.errors import RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.recipe.sections import uses_lm
from kdrecipe.recipe.trials import EXAMPLE, SPLIT, unequal
from kdrecipe.score.hypotheses import hyps_file
from kdrecipe.stages.inputs import model_plugins
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.interfaces import Metric

JOB = "trials"
TABLE, DATA = "TRIALS.md", "trials.json"


def compared(recipe: Recipe) -> dict[str, list[str]]:
    """System -> itself and its trials."""
    found: dict[str, list[str]] = {}
    for trial in recipe.trials:
        found.setdefault(trial.of, [trial.of]).append(trial.name)
    return found


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Recognise dev with each system, then the table; what is not for these is taken out of the plan.

    Raises:
        RecipeError: no system has trials.
    """
    if not recipe.trials:
        where = recipe.document.where(("systems",))
        raise RecipeError("no system has trials", where=where, remedy=f"beside train or distill, {EXAMPLE}")
    names = [name for row in compared(recipe).values() for name in row]
    needs = [f"{name}/seed{recipe.systems[name].seeds[0]}" for name in names]
    for of, row in compared(recipe).items():
        needs.append(_add_dev_job(plan, recipe, layout, of, row))
    metric = recipe.decode.metrics[0]
    inputs = {
        "trials": [[trial.of, trial.name, trial.options] for trial in recipe.trials],
        "metric": {"name": metric.name, **metric.options},
        "plugin": recipe.plugins.registry.fingerprint("metrics", metric.name),
        "command": recipe.command,
    }
    plan.add(Job(10, JOB, layout.report, inputs, partial(run, recipe, layout), tuple(needs)))
    plan.keep_for(JOB)


def _add_dev_job(plan: Plan, recipe: Recipe, layout: Layout, of: str, names: Sequence[str]) -> str:
    """One job for a system and its trials, since a process takes longer to start than dev to recognise."""
    search = next(iter(recipe.searches_of(of).values()))
    seed = recipe.systems[of].seeds[0]
    inputs = {
        "search": {"name": search.name, **search.options},
        "plugin": recipe.plugins.registry.fingerprint("decoders", search.name),
        "longest_s": recipe.decode.longest_s,
        "model": model_plugins(recipe, of),
    }
    needs = [*(f"{name}/seed{seed}" for name in names), "features"]
    needs += ["lm"] if uses_lm(search.options) else []
    out, work = layout.hyps(of, seed), partial(recognise, recipe, layout, names)
    plan.add(Job(8, f"dev/{of}/seed{seed}", out, inputs, work, tuple(needs), alone=False))
    return f"dev/{of}/seed{seed}"


def recognise(recipe: Recipe, layout: Layout, names: Sequence[str], out: Path) -> None:
    """Recognise dev with the bundles of systems and their main search."""
    from kdrecipe.data.features import load_cuts
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.stages.decode import decode_cuts, main_search
    from kdrecipe.stages.rows import write_rows

    cuts = list(load_cuts(layout.features, SPLIT))
    for name in names:
        place = layout.system(name, recipe.systems[name].seeds[0])
        bundle = Bundle.load(place, recipe.plugins.registry)
        label, decoder = main_search(recipe, layout, bundle)
        said = decode_cuts(bundle, {label: decoder}, cuts, recipe.decode.longest_s)
        write_rows(hyps_file(out, name), said[label])


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Score them all, and write table and data."""
    from kdrecipe.report.trials import markdown

    wanted = recipe.decode.metrics[0]
    cls = recipe.plugins.registry.get("metrics", wanted.name)
    metric = cls(cls.Config.model_validate(wanted.options))
    changed = {trial.name: dict(trial.options) for trial in recipe.trials}
    systems = [
        {
            "name": of,
            "options": [
                {"changed": changed.get(name, {}), **_facts(recipe, layout, of, name, metric)}
                for name in names
            ],
        }
        for of, names in compared(recipe).items()
    ]
    note = unequal(recipe.trials, recipe.systems)
    data = {
        "recipe": recipe.name,
        "command": recipe.command,
        "seed": recipe.seeds[0],
        "metric": wanted.name,
        "notes": [note] if note else [],
        "systems": systems,
    }
    write_json(out / DATA, data)
    table = markdown(data)
    write_atomic(out / TABLE, table)
    print(table, flush=True)


def _facts(recipe: Recipe, layout: Layout, of: str, name: str, metric: Metric) -> dict[str, Any]:
    """Error rate and token error rate on dev, and what the training took."""
    from kdrecipe.score.searches import mean_rates

    seed = recipe.systems[name].seeds[0]
    files = {seed: {SPLIT: hyps_file(layout.hyps(of, seed), name)}}
    training = read_json(layout.system(name, seed) / "bundle.json")["training"]
    return {
        "rate": mean_rates(files, {"it": metric})[SPLIT]["it"],
        "dev_ter": training["dev_ter"],
        "steps": training["steps"],
        "stopped": training["stopped"],
    }


def publish(recipe: Recipe, made: Path) -> None:
    """Renew the table beside the recipe from ``made``, if it is of the recipe as it stands."""
    for name in (TABLE, DATA) if recipe.as_it_stands else ():
        shutil.copyfile(made / name, recipe.dir / name)
