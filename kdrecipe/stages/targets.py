"""Stage 4: what each teacher says about the training audio, once, on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces import FORCED_KINDS
from kdrecipe.jobs.executors import job_label
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.targets.cache import Labels


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed whose targets are cached."""
    from kdrecipe.stages.codebooks import jobs_of
    from kdrecipe.stages.inputs import all_needs, cached_for, model_plugins

    for teacher in recipe.teaching():
        students = cached_for(recipe, teacher)
        needs = all_needs(recipe, teacher, students)
        if not needs:
            continue
        for seed in recipe.systems[teacher].seeds:
            name = f"{teacher}/seed{seed}"
            parts = {(s.data, s.unlabelled) for s in students}
            labels = _label_jobs(recipe, teacher, seed)
            inputs = {
                "specs": [
                    vars(replace(need, align=None)) for need in needs
                ],  # the cache has the teacher's frames
                "parts": sorted(parts, key=str),
                "model": model_plugins(recipe, teacher),
                **({"labels": sorted(map(str, labels.values()))} if labels else {}),
                **_own_text(recipe, teacher),
            }
            plan.add(
                Job(
                    4,
                    f"targets/{name}",
                    layout.targets(teacher, seed),
                    inputs,
                    partial(run, recipe, layout, teacher, seed),
                    ("features", "tokens", name, *labels, *jobs_of(plan, [(teacher, seed)])),
                    resumable=True,
                    in_place=True,
                    alone=False,
                )
            )


def _label_jobs(recipe: Recipe, teacher: str, seed: int) -> dict[str, list[Any]]:
    """Jobs of hypotheses along which a teacher speaks, since they are labels -> which of them are."""
    from kdrecipe.stages.inputs import cached_for

    jobs: dict[str, list[Any]] = {}
    for student in cached_for(recipe, teacher):
        for its_seed in _label_seeds(recipe, student, teacher, seed):
            assert student.keep is not None
            used = [student.data, student.unlabelled, student.keep.model_dump(mode="json")]
            jobs.setdefault(f"hypotheses/{student.labels}/seed{its_seed}", []).append(used)
    return jobs


def _label_seeds(recipe: Recipe, student: System, teacher: str, seed: int) -> list[int]:
    """Seeds of the one whose hypotheses are labels of a student, if it learns from ``teacher`` along them."""
    from kdrecipe.stages.inputs import needs_of

    forced = any(need.kind in FORCED_KINDS for need in needs_of(recipe, student, teacher))
    if student.labels is None or not forced:
        return []
    of = {recipe.seed_of(student.labels, s) for s in student.seeds if recipe.seed_of(teacher, s) == seed}
    return sorted(of)


def _own_text(recipe: Recipe, teacher: str) -> dict[str, Any]:
    """How the teacher's own words are written where they are spelled in the recipe's tokens."""
    trims = recipe.tokens.teacher is not None and recipe.systems[teacher].is_imported
    return {"text": recipe.systems[teacher].text.model_dump(mode="json")} if trims else {}


def _texts_heard(
    recipe: Recipe, layout: Layout, teacher: str, seed: int, tokens: Tokenizer
) -> tuple[list[Labels], set[str]]:
    """Labels that are hypotheses, by cut; and cuts that some student hears without any label."""
    from kdrecipe.stages.inputs import cached_for
    from kdrecipe.stages.labels import kept_of
    from kdrecipe.stages.session import training_data

    labels: list[Labels] = []
    own: set[str] = set()
    for student in cached_for(recipe, teacher):
        cuts, _, hears = training_data(layout, [student])
        seeds = _label_seeds(recipe, student, teacher, seed)
        own |= set() if seeds else set(hears)
        for its_seed in seeds:
            assert student.labels is not None
            assert student.keep is not None
            texts = kept_of(layout, student.labels, its_seed, student.keep, hears)[1]
            found = {
                cut_id: (text, tokens.encode(text))
                for cut_id, original in zip(cuts.ids, cuts.original_ids(), strict=True)
                if cut_id in hears and (text := texts.get(original)) is not None
            }
            labels.append(found)
            own |= hears - found.keys()
    return labels, own


def run(recipe: Recipe, layout: Layout, name: str, seed: int, out: Path) -> None:
    """Run the teacher over the training cuts that some student learns from, and no others.

    Along a text it speaks for each text that a student hears: the transcript, a hypothesis that is the
    student's label, its own words where the student has neither.
    """
    from kdrecipe.data.batches import CutBatches
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.stages.codebooks import with_codebooks
    from kdrecipe.stages.inputs import all_needs, cached_for
    from kdrecipe.stages.session import target_key, training_data
    from kdrecipe.stages.teachers import open_teacher
    from kdrecipe.targets.cache import write_targets
    from kdrecipe.train.distribution import local_device
    from kdrecipe.train.log import Progress

    tokens = Tokenizer.load(layout.tokens)
    opened = with_codebooks(recipe, layout, open_teacher(recipe, layout, name, seed, tokens), seed)
    device = local_device()
    opened.load(device)
    cuts, labelled, _ = training_data(layout, cached_for(recipe, name))
    labels, own = _texts_heard(recipe, layout, name, seed, tokens)
    batches = CutBatches(
        cuts,
        tokens,
        batch_duration_s=120.0,
        seed=0,
        labelled_ids=labelled,
        shuffle=False,
        with_audio=opened.teacher.input == "audio",
    )
    offered = opened.provides()
    wanted = all_needs(recipe, name, cached_for(recipe, name))
    gives = [(need, need.among(offered)) for need in wanted]
    needs = [replace(need, frame_shift_s=its.frame_shift_s, align=None) for need, its in gives if its]
    progress = Progress(job_label(f"targets/{name}"), len(batches), unit="utterance")
    write_targets(
        cuts,
        batches,
        opened.teacher,
        needs,
        out,
        key_parts=target_key(opened, recipe),
        own_ids=own,
        labels=labels,
        device=device,
        progress=progress.advance,
    )
    progress.close()
