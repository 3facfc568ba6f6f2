"""Stage 4: what each teacher says about the training audio, once, on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from kdrecipe.jobs.executors import job_label
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout


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
            inputs = {
                "specs": [
                    vars(replace(need, align=None)) for need in needs
                ],  # the cache has the teacher's frames
                "parts": sorted(parts, key=str),
                "model": model_plugins(recipe, teacher),
            }
            plan.add(
                Job(
                    4,
                    f"targets/{name}",
                    layout.targets(teacher, seed),
                    inputs,
                    partial(run, recipe, layout, teacher, seed),
                    ("features", "tokens", name, *jobs_of(plan, [(teacher, seed)])),
                    resumable=True,
                    in_place=True,
                    alone=False,
                )
            )


def run(recipe: Recipe, layout: Layout, name: str, seed: int, out: Path) -> None:
    """Run the teacher over the training cuts that some student learns from, and no others."""
    from kdrecipe.data.batches import CutBatches
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.stages.codebooks import with_codebooks
    from kdrecipe.stages.inputs import all_needs, cached_for
    from kdrecipe.stages.session import target_key, training_data
    from kdrecipe.stages.teachers import open_teacher
    from kdrecipe.targets.cache import write_targets
    from kdrecipe.train.distribution import local_device
    from kdrecipe.train.log import Progress

    opened = with_codebooks(recipe, layout, open_teacher(recipe, layout, name, seed), seed)
    device = local_device()
    opened.load(device)
    cuts, labelled, unlabelled = training_data(layout, cached_for(recipe, name))
    batches = CutBatches(
        cuts,
        Tokenizer.load(layout.tokens),
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
        own_ids=unlabelled,
        device=device,
        progress=progress.advance,
    )
    progress.close()
