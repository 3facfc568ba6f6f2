"""Stage 3, after the teachers: whether each has learnt clearly more than a quick baseline.

The baseline is the encoder of the teacher's smallest student with a CTC head, trained for a fraction of
the teacher's steps. Its optimiser and learning rate are the core's own, not the recipe's: those may be the
reason why a teacher learnt nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job, why_run
from kdrecipe.recipe import tiny
from kdrecipe.recipe.load import Recipe, System, Training
from kdrecipe.recipe.sections import NONE, Term
from kdrecipe.report.guard import verdict
from kdrecipe.stages.layout import Layout
from kdrecipe.text import clean

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

    from kdrecipe.interfaces import Teacher
    from kdrecipe.model.asr import AsrModel
    from kdrecipe.stages.session import Session
    from kdrecipe.text_form import TextForm

SHARE = 0.1  # of the teacher's steps
MIN_STEPS = 240  # after so many a small model has left CTC's plateau on AN4, see docs/decisions.md
MAX_STEPS = 2000
MAX_UTTERANCES = 300  # of dev, over all speakers
MAX_BATCH_S = 60.0
NOT_TINY = f"the profile {tiny.NAME} trains too little for one"


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher, for all its seeds. No student depends on it: a verdict changes no weights."""
    from kdrecipe.stages.inputs import system_inputs

    for name in recipe.first_teachers():
        seeds = recipe.systems[name].seeds
        inputs = {
            "baselines": [dict(system_inputs(recipe, system)) for system in baselines(recipe, name)],
            "seed": seeds[0],
            "judged": recipe.profile != tiny.NAME,
        }
        needs = ("features", "tokens", *(f"{name}/seed{seed}" for seed in seeds))
        job = Job(
            3,
            f"guard/{name}",
            layout.guard(name),
            inputs,
            partial(run, recipe, layout, name),
            needs,
            resumable=True,
            alone=False,
        )
        plan.add(job)


def warnings(recipe: Recipe, layout: Layout, plan: Plan, will_run: Container[str]) -> Iterator[str]:
    """What earlier runs found and this one does not look at again: a line for each teacher that failed."""
    for name in recipe.first_teachers():
        job = plan.jobs[f"guard/{name}"]
        if job.name not in will_run and why_run(job, plan.jobs) is None:
            for row in read_json(layout.guard(name) / "guard.json")["verdicts"]:
                if row["learnt"] is False:
                    yield ": ".join(verdict(row))


def baselines(recipe: Recipe, teacher: str) -> list[System]:
    """What may be the baseline: each student's encoder with a CTC head, on the labels that the teacher had.

    What an imported teacher learnt from is not known: there it is the labels that the student has.
    """
    taught = recipe.systems[teacher]
    found = []
    for student in recipe.systems.values():
        data = student.data if taught.kind == "pretrained" else taught.data
        if teacher not in student.teachers or student.model is None or data == NONE:
            continue
        options = student.model["heads"].get("ctc", {})
        baseline = replace(
            student,
            kind="trained",
            model={**student.model, "heads": {"ctc": options}},
            data=data,
            unlabelled=None,
            labels=None,
            keep=None,
            teachers=(),
            init_from=None,
            init_layers={},
            terms=(Term("ctc"),),
            training=_quick(student.training),
        )
        found.append(baseline)
    return found


def _quick(training: Training) -> Training:
    """The core's own settings, but for what depends on the machine and on the size of the corpus."""
    return Training(
        batch_duration_s=min(MAX_BATCH_S, training.batch_duration_s),
        precision=training.precision,
        schedule="linear",
        spec_augment=None,
    )


def run(recipe: Recipe, layout: Layout, teacher: str, out: Path) -> None:
    """Train the baseline, compare each seed of the teacher with it, and say a line of each."""
    from kdrecipe.score.guard import compare
    from kdrecipe.stages.labels import form_of
    from kdrecipe.stages.session import Session
    from kdrecipe.stages.teachers import facts_of, open_teacher
    from kdrecipe.targets.live import ModelTeacher

    dev, candidates = _dev_sample(layout), baselines(recipe, teacher)
    if not dev or not candidates:
        why = "no student of it has labels" if dev else "the corpus has no dev"
        write_json(out / "guard.json", {"baseline": None, "verdicts": []})
        print(f"{teacher}: not compared with a quick baseline, since {why}", flush=True)
        if dev:
            _say_errors(recipe, layout, teacher, dev)
        return
    system, is_tiny = recipe.systems[teacher], recipe.profile == tiny.NAME
    training = {seed: facts_of(layout, teacher, seed).get("training") or {} for seed in system.seeds}
    taken = None if system.kind == "pretrained" else training[system.seeds[0]]["steps"]
    chosen = replace(_smallest(recipe, candidates), name=f"quick baseline of {teacher}")
    session = Session(recipe, layout, chosen, system.seeds[0])
    facts, model = _trained(session, None if is_tiny else num_steps(taken), out / "train")
    said = _recognised(ModelTeacher(model, session.tokens), dev)
    speakers = {cut.id: cut.supervisions[0].speaker for cut in dev if cut.supervisions[0].speaker}
    form = form_of(recipe, layout, system) if system.is_imported else None
    rows = []
    for seed in system.seeds:
        opened = open_teacher(recipe, layout, teacher, seed)
        row = {
            "system": teacher,
            "seed": seed,
            "kind": system.kind,
            **compare(_recognised(opened.teacher, dev, form), said, speakers),
            "baseline_steps": facts["steps"],
            "curve": _curve(layout.system(teacher, seed) / "train" / "log.jsonl"),
            "max_epochs": system.training.epochs,
            "stopped": training[seed].get("stopped"),
        }
        rows.append({**row, "learnt": None, "why": NOT_TINY} if is_tiny else row)
        print(": ".join(verdict(rows[-1])), flush=True)
    write_json(out / "guard.json", {"baseline": facts, "verdicts": rows})


def _say_errors(recipe: Recipe, layout: Layout, teacher: str, dev: Sequence[MonoCut]) -> None:
    """A line for each seed of a teacher: its errors on dev."""
    from kdrecipe.score.guard import error_rates
    from kdrecipe.stages.labels import form_of
    from kdrecipe.stages.teachers import open_teacher

    system = recipe.systems[teacher]
    form = form_of(recipe, layout, system) if system.is_imported else None
    for seed in system.seeds:
        said = _recognised(open_teacher(recipe, layout, teacher, seed).teacher, dev, form)
        words, characters = error_rates(list(said.values()))
        rates = f"{100 * words:.1f} % of dev's words wrong, {100 * characters:.1f} % of its characters"
        print(f"{teacher}/seed{seed}: {rates}", flush=True)


def _dev_sample(layout: Layout) -> list[MonoCut]:
    """Utterances of dev, over all speakers; none if the corpus has no dev."""
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.data.features import has_dev, load_cuts

    if not has_dev(layout.features):
        return []
    return drawn_over_speakers(load_cuts(layout.features, "dev"), MAX_UTTERANCES)


def _smallest(recipe: Recipe, systems: Sequence[System]) -> System:
    """The system whose encoder has the fewest parameters."""
    from kdrecipe.recipe.fit import build_encoder

    def num_params(system: System) -> int:
        model, bins = system.model or {}, recipe.features.num_mel_bins
        encoder = build_encoder(recipe.plugins.registry, model, bins)
        return sum(p.numel() for p in encoder.parameters())

    return min(systems, key=num_params)


def num_steps(of_teacher: int | None) -> int:
    """Optimiser steps of the baseline, by those that the teacher took; None: it is imported."""
    if of_teacher is None:
        return MIN_STEPS
    return min(max(MIN_STEPS, round(SHARE * of_teacher)), of_teacher, MAX_STEPS)


def _trained(session: Session, steps: int | None, work_dir: Path) -> tuple[dict[str, Any], AsrModel]:
    """Train the baseline for about so many steps; None: one epoch.

    A run has whole epochs, so the data is cut down until some of them have that many steps.

    Returns:
        What it is, and the model.
    """
    training, epochs = session.system.training, 1
    if steps is not None:
        data = session.batches(training)
        epochs = -(-steps // data.num_batches(0))
        share = steps / (epochs * data.num_batches(0))
        session = replace(session, max_audio_s=share * data.total_s)
    model = session.new_model()
    fixed = training.model_copy(update={"epochs": epochs, "dev_every": epochs})
    result = session.run(model, work_dir, fixed)
    shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
    system = session.system
    facts = {"model": system.model, "params": model.num_params, "data": system.data, "seed": session.seed}
    return {**facts, "steps": result.steps, "epochs": result.epochs}, model


def _recognised(
    teacher: Teacher, dev: Sequence[MonoCut], form: TextForm | None = None
) -> dict[str, tuple[str, str]]:
    """Utterance id -> (reference, what it recognises by greedy search, or by a search of its own)."""
    from kdrecipe.data.batches import transcript_of
    from kdrecipe.stages.teachers import hypotheses
    from kdrecipe.train.distribution import local_device

    device = local_device()
    teacher.load(device)
    references = {cut.id: transcript_of(cut) for cut in dev}
    found = hypotheses(teacher, dev, device, MAX_BATCH_S)
    write = form.apply if form else clean
    return {cut_id: (references[cut_id], write(said.text)) for cut_id, said in found}


def _curve(log: Path) -> list[tuple[int, float]]:
    """(epoch, dev token error rate) by a training's log; none of an imported model."""
    from kdrecipe.report.reading import read_log

    rows = [row for row in read_log(log) if row.get("event") == "epoch"]
    return [(row["epoch"], row["dev_ter"]) for row in rows if row.get("dev_ter") is not None]
