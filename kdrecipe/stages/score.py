"""Stage 9: hypotheses -> error rates with intervals, significance, fidelity to the teacher.

The same for the searches of a system on its bundle, against its main one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.score.hypotheses import (
    bundle_hyps_file,
    condition_hyps_file,
    hyps_file,
    read_hypotheses,
)
from kdrecipe.stages.layout import Layout
from kdrecipe.text import read_lines

if TYPE_CHECKING:
    from kdrecipe.interfaces import Metric


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """The stage's one job: systems are compared with each other."""
    registry = recipe.plugins.registry
    inputs = {
        "metrics": [{"name": m.name, **m.options} for m in recipe.decode.metrics],
        "plugins": {m.name: registry.fingerprint("metrics", m.name) for m in recipe.decode.metrics},
        "compare": comparisons(recipe),
        "baselines": baselines(recipe),
        "families": families(recipe),
        "robustness": recipe.decode.robustness,
    }
    needs = tuple(
        f"decode/{name}/seed{seed}" for name in recipe.build_order() for seed in recipe.systems[name].seeds
    )
    plan.add(Job(9, "score", layout.scores, inputs, lambda out: run(recipe, layout, out), needs))


def hypotheses(recipe: Recipe, layout: Layout) -> dict[str, dict[int, dict[str, Path]]]:
    """System -> seed -> split -> the hypotheses of its row, in the order of the recipe."""
    return {
        name: {
            seed: {split: hyps_file(layout.hyps(name, seed), split) for split in recipe.decode.splits}
            for seed in system.seeds
        }
        for name, system in recipe.systems.items()
    }


def search_facts(recipe: Recipe, layout: Layout) -> dict[str, dict[int, dict[str, dict[str, Any]]]]:
    """System -> seed -> label of the search, the main one first -> what stage 8 noted of it."""
    return {
        name: {seed: read_json(layout.hyps(name, seed) / "decode.json")["searches"] for seed in system.seeds}
        for name, system in recipe.systems.items()
    }


def _search_hypotheses(
    recipe: Recipe, layout: Layout, facts: dict[str, dict[int, dict[str, dict[str, Any]]]]
) -> dict[str, dict[str, dict[int, dict[str, Path]]]]:
    """System -> label -> seed -> split -> hypotheses of the bundle."""
    found: dict[str, dict[str, dict[int, dict[str, Path]]]] = {}
    for name, seeds in facts.items():
        for seed, labels in seeds.items():
            directory = layout.hyps(name, seed)
            for label in labels:
                files = {split: bundle_hyps_file(directory, label, split) for split in recipe.decode.splits}
                found.setdefault(name, {}).setdefault(label, {})[seed] = files
    return found


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Score all splits of all systems, and the searches of each against each other."""
    from kdrecipe.score.scoring import Question, score
    from kdrecipe.score.searches import mean_rates, score_searches

    registry = recipe.plugins.registry
    metrics = {}
    for wanted in recipe.decode.metrics:
        cls = registry.get("metrics", wanted.name)
        metrics[wanted.name] = cls(cls.Config.model_validate(wanted.options))
    main_metric = next(iter(metrics))
    hyps = hypotheses(recipe, layout)
    teachers = {n: s.teachers[0] for n, s in recipe.systems.items() if s.teachers}
    question = Question(
        teachers=teachers,
        baselines=baselines(recipe),
        compare=comparisons(recipe),
        families=families(recipe),
    )
    speakers = _speakers(hyps)
    result = score(hyps, metrics, question, speakers=speakers)
    for split, note in _rewritten(recipe, layout):
        result["splits"][split]["notes"].append(note)
    facts = search_facts(recipe, layout)
    files = _search_hypotheses(recipe, layout, facts)
    first_seed = {name: next(iter(seeds.values())) for name, seeds in facts.items()}
    result["searches"] = score_searches(files, first_seed, metrics, speakers=speakers)
    main = {name: next(iter(labels.values())) for name, labels in files.items()}
    result["bundles"] = {name: mean_rates(seeds, metrics) for name, seeds in main.items()}
    result["robustness"] = _robustness(recipe, layout, {main_metric: metrics[main_metric]})
    write_json(out / "scores.json", result)
    first = recipe.decode.splits[0]
    for name, facts in result["splits"][first]["systems"].items():
        rate = 100 * facts[main_metric]["mean"]
        print(f"  {name:20s} {main_metric.upper()} {rate:6.2f} % on {first}", flush=True)


def _robustness(recipe: Recipe, layout: Layout, metric: dict[str, Metric]) -> dict[str, Any]:
    """Error rates of some utterances under conditions: ``metric``, ``utterances``, ``conditions`` (name -> in
    words) and ``systems`` (name -> condition -> rate); empty if none were recognised."""
    from kdrecipe.measure.conditions import CONDITIONS
    from kdrecipe.score.searches import mean_rates

    if not recipe.decode.robustness:
        return {}
    [name] = metric
    rates = {}
    for system in recipe.systems.values():
        places = {seed: layout.hyps(system.name, seed) for seed in system.seeds}
        files = {
            seed: {condition: condition_hyps_file(place, condition) for condition in CONDITIONS}
            for seed, place in places.items()
        }
        found = mean_rates(files, metric)
        rates[system.name] = {condition: found[condition][name] for condition in CONDITIONS}
    clean = read_hypotheses(next(iter(files[system.seeds[0]].values())))
    titles = {condition: found.title for condition, found in CONDITIONS.items()}
    return {"metric": name, "utterances": len(clean), "conditions": titles, "systems": rates}


def _rewritten(recipe: Recipe, layout: Layout) -> Iterator[tuple[str, str]]:
    """Split and note for each system whose row counts rewritten texts; of several seeds, the first such."""
    for name, system in recipe.systems.items():
        found = (read_json(layout.hyps(name, seed) / "decode.json").get("rewritten") for seed in system.seeds)
        for split, note in next((notes for notes in found if notes), {}).items():
            yield split, f"{name}: {note}; its row counts what the runtime writes"


def _speakers(hyps: dict[str, dict[int, dict[str, Path]]]) -> dict[str, str]:
    """Utterance id -> speaker, of those whose cuts name one: stage 8 wrote it beside the hypothesis."""
    found: dict[str, str] = {}
    for path in next(iter(next(iter(hyps.values())).values())).values():
        for line in read_lines(path):
            row = json.loads(line)
            if row.get("speaker") is not None:
                found[row["id"]] = row["speaker"]
    return found


def families(recipe: Recipe) -> dict[str, str]:
    """System -> its family: systems whose models of the same seed have to do with each other.

    These are a system of several seeds and what it is made from with the same seed: its parent,
    its teachers, what it starts from. A single model that all seeds are made from pairs nothing.
    """
    found = {name: name for name in recipe.build_order()}
    for name, system in recipe.systems.items():
        for other in system.needs:
            if min(len(system.seeds), len(recipe.systems[other].seeds)) > 1:
                mine, theirs = found[name], found[other]
                found = {member: theirs if f == mine else f for member, f in found.items()}
    return found


def baselines(recipe: Recipe) -> dict[str, str]:
    """Distilled system -> the system of the same model and labels that had no teacher.

    Of several, the one with the fewest losses: plain training before self-distillation.
    """
    found: dict[str, str] = {}
    for name, system in recipe.systems.items():
        if system.kind != "distilled":
            continue
        alike = [s for s in recipe.systems.values() if _is_baseline(s, system)]
        if alike:
            found[name] = min(alike, key=lambda s: len(s.terms)).name
    return found


def _is_baseline(candidate: System, student: System) -> bool:
    same_model = candidate.model == student.model and candidate.data == student.data
    starts = [(s.init_from, s.init_layers) for s in (candidate, student)]
    return candidate.kind == "trained" and same_model and starts[0] == starts[1]


def comparisons(recipe: Recipe) -> list[tuple[str, str]]:
    """Pairs to test: the recipe's own, or each student with every system trained without a teacher
    on the same labels, and each compressed system with its parent."""
    if recipe.decode.compare:
        return list(recipe.decode.compare)
    pairs = []
    for name, system in recipe.systems.items():
        if system.kind == "distilled":
            pairs += [(name, s.name) for s in recipe.systems.values() if _is_baseline(s, system)]
        elif system.kind == "compressed" and system.parent:
            pairs.append((name, system.parent))
    return pairs
