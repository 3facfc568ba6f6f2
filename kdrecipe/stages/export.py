"""Stage 7: bundles -> files for the device, refused if they do not say what the bundle says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_json
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.load import Named, Recipe, System
from kdrecipe.recipe.suitable import exporters_for
from kdrecipe.stages.inputs import model_plugins
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.corpus.audio import Utterance

COMPARED_ON = "dev, without it train; utterances drawn over all speakers"


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per system and seed, for all of the recipe's exporters that suit the system."""
    registry = recipe.plugins.registry
    for name in recipe.build_order():
        system = recipe.systems[name]
        if system.is_imported:
            continue
        exporters = _exporters(recipe, recipe.model_of(name))
        for seed in system.seeds:
            inputs = {
                "export": [{"name": e.name, **e.options} for e in exporters],
                "plugins": {e.name: registry.fingerprint("exporters", e.name) for e in exporters},
                "model": model_plugins(recipe, name),
                "parity": recipe.parity.model_dump(mode="json"),
                "compared_on": COMPARED_ON,
            }
            plan.add(
                Job(
                    7,
                    f"export/{name}/seed{seed}",
                    layout.export(name, seed),
                    inputs,
                    partial(run, recipe, layout, system, seed),
                    (f"{name}/seed{seed}", "features"),
                    alone=False,
                )
            )


def _exporters(recipe: Recipe, model: Mapping[str, Any] | None) -> tuple[Named, ...]:
    """Those that suit a model of this description; all where it is not known yet."""
    return recipe.export if model is None else exporters_for(model, recipe.export, recipe.plugins.registry)


def compared_utterances(layout: Layout, num: int) -> list[Utterance]:
    """What :data:`COMPARED_ON` says, ``num`` of them; of what runtimes would cut, the first piece."""
    from kdrecipe.corpus.audio import Utterance, utterances_from_cuts
    from kdrecipe.corpus.segments import segments
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.data.features import tuning_cuts

    found = []
    for utterance in utterances_from_cuts(drawn_over_speakers(tuning_cuts(layout.features), num)):
        for _, first_S in itertools.islice(segments([utterance.samples_S], SAMPLE_RATE), 1):
            is_whole = len(first_S) == len(utterance.samples_S)
            found.append(utterance if is_whole else Utterance(utterance.id, first_S))
    return found


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Export, then compare.

    Raises:
        ParityError: an export strays from its bundle by more than ``parity`` allows.
    """
    from kdrecipe.measure.parity import check_parity
    from kdrecipe.model.bundle import Bundle

    bundle = Bundle.load(layout.system(system.name, seed), recipe.plugins.registry)
    sample = compared_utterances(layout, recipe.parity.num_utterances)
    found = {}
    for wanted in _exporters(recipe, bundle.meta["model"]):
        cls = recipe.plugins.registry.get("exporters", wanted.name)
        exporter = cls(cls.Config.model_validate(wanted.options))
        files = returned(
            exporter.export(bundle, out / wanted.name), dict, f"exporter {wanted.name!r}", "export"
        )
        found[wanted.name] = {
            "files": files,
            "parity": check_parity(
                bundle, exporter, out / wanted.name, sample, recipe.parity, variants=list(files)
            ),
        }
    write_json(out / "parity.json", found)
