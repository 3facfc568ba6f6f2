"""Stages 3 and 5: teachers, and students with or without one, all by the same loop."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import sha256_file, write_json
from kdrecipe.errors import PluginError, Problem, RecipeError
from kdrecipe.interfaces import VOCABULARY_KINDS
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.model.bundle import DATA_FILES
from kdrecipe.plugin.carried import carry, refusal
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.recipe.sections import uses_lm
from kdrecipe.recipe.starting import misfits, shared_parts
from kdrecipe.stages.inputs import needs_of_training
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.teachers import import_job, open_teacher

if TYPE_CHECKING:
    from kdrecipe.model.asr import AsrModel
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.model.start import Lender
    from kdrecipe.stages.session import Session

FIT_S = 600.0
"""Seconds of training audio on which an encoder's input is fitted to an imported model's."""


def add_writers(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Stage 2: imported teachers whose hypotheses tokens or the language model are learnt from."""
    for name in recipe.writers:
        _add(plan, recipe, layout, recipe.systems[name], stage=2)


def add_teachers(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Stage 3: what teaches and has no teacher itself."""
    for name in recipe.teaching():
        if name not in recipe.writers:
            _add(plan, recipe, layout, recipe.systems[name], stage=3)


def add_students(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Stage 5: every other system that is trained or imported."""
    for name in recipe.build_order():
        system = recipe.systems[name]
        if system.kind != "compressed" and name not in (*recipe.teaching(), *recipe.writers):
            _add(plan, recipe, layout, system, stage=5)


def _add(plan: Plan, recipe: Recipe, layout: Layout, system: System, stage: int) -> None:
    for seed in system.seeds:
        out = layout.system(system.name, seed)
        name = f"{system.name}/seed{seed}"
        if system.is_imported:
            learnt = recipe.tokens.name in ("bpe", "unigram", "char")  # and not a teacher's
            why = _why_same_tokens(recipe, system) if learnt and stage > 2 else None
            plan.add(import_job(recipe, layout, system, seed, stage, why))
            continue
        if system.kind == "pretrained":
            inputs = {"bundle": _content(system)}
            needs = ("tokens",) if _why_same_tokens(recipe, system) else ()
            plan.add(Job(stage, name, out, inputs, _importer(recipe, layout, system, seed), needs))
            continue
        plan.add(
            Job(
                stage,
                name,
                out,
                {"system": _inputs(recipe, system), "seed": seed},
                partial(run, recipe, layout, system, seed),
                needs=needs_of_training(plan, recipe, system, seed),
                resumable=True,
                alone=False,
                together=True,
            )
        )


def _inputs(recipe: Recipe, system: System) -> dict[str, object]:
    from kdrecipe.stages.inputs import system_inputs

    return dict(system_inputs(recipe, system))


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Train one system with one seed and write its bundle; ``out/train`` keeps log and checkpoints."""
    from kdrecipe.model.bundle import Bundle, provenance
    from kdrecipe.stages.session import Session
    from kdrecipe.train.distribution import is_first

    assert system.model is not None  # pretrained ones are imported
    session = Session(recipe, layout, system, seed)
    model = session.new_model()
    if system.init_from:
        _start(session, model, lender(recipe, layout, system.init_from, seed))
    options = system.training.model_copy(update={"flat_start": 0}) if system.init_from else system.training
    training = session.run(model, out / "train", options).summary()
    if not is_first():
        return
    made = provenance(recipe.command, recipe=recipe.name, seconds=training.pop("seconds"))
    meta: dict[str, Any] = {
        "name": system.name,
        "kind": system.kind,
        "parent": system.teachers[0] if system.teachers else system.init_from,
        "seed": seed,
        "model": system.model,
        "features": recipe.features.model_dump(mode="json"),
        "compression": [],
        "training": training,
        **({"labels": session.labels_report} if session.labels_report else {}),
        "plugin_files": carry(recipe.plugin_files, out),
    }
    Bundle.save(out, model, session.tokens, meta, made)
    shutil.rmtree(out / "train" / "checkpoints", ignore_errors=True)


def lender(recipe: Recipe, layout: Layout, name: str, seed: int) -> Lender:
    """What system ``name`` lends of its weights to a system of this seed."""
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.model.start import Lender

    its_seed = recipe.seed_of(name, seed)
    if recipe.systems[name].is_imported:
        return Lender.of_teacher(open_teacher(recipe, layout, name, its_seed).teacher)
    place = layout.system(name, its_seed)
    return Lender.of_bundle(Bundle.load(place, recipe.plugins.registry))


def _start(session: Session, model: AsrModel, lender: Lender) -> None:
    """Let a new model begin with the weights that its system takes over."""
    from kdrecipe.model.start import start_from

    recipe, system = session.recipe, session.system
    assert system.model is not None
    registry, where = recipe.plugins.registry, recipe.document.where(("systems", system.name))
    if found := list(misfits(registry, system.model, lender.model, system.init_layers)):
        # of a bundle or an imported model, which the check of the recipe may not have seen
        problems = [Problem(f"init_from: {system.init_from!r} {p.what}", where, p.remedy) for p in found]
        raise RecipeError(problems)
    parts = shared_parts(registry, system.model, lender.model, system.init_layers)
    try:
        to_fit = start_from(model, lender, parts, session.tokens.pieces)
    except RecipeError as error:
        raise RecipeError([replace(problem, where=where) for problem in error.problems]) from error
    if to_fit:
        encoder: Any = model.encoder
        error_share = encoder.fit_input(session.heard_audio(FIT_S, model.norm))
        print(
            f"  {system.name}: features mapped to those of {system.init_from}, {error_share:.0%} off",
            flush=True,
        )


def _content(system: System) -> dict[str, str] | None:
    """Hash of every file of an imported bundle; None where there is none (yet)."""
    path = system.bundle
    if path is None or not path.is_dir():
        return None
    return {file.name: sha256_file(file) for file in sorted(path.iterdir()) if _counts(file)}


def _counts(file: Path) -> bool:
    return file.is_file() and (file.name in DATA_FILES or file.suffix == ".py")


def _why_same_tokens(recipe: Recipe, system: System) -> str | None:
    """Why an imported bundle must have the recipe's tokens; None: it may have its own."""
    from kdrecipe.stages.inputs import needs_of

    students = [student for student in recipe.systems.values() if system.name in student.teachers]
    needs = [need for student in students for need in needs_of(recipe, student, system.name)]
    if any(need.kind in VOCABULARY_KINDS for need in needs):
        return "a loss compares posteriors over them"
    if any(uses_lm(decoder.options) for decoder in recipe.searches_of(system.name).values()):
        return "a search has a language model over them"
    return None


def _refuse_other_tokens(recipe: Recipe, layout: Layout, system: System, bundle: Bundle, why: str) -> None:
    """What the check of the recipe can't know: which tokens stage 2 makes of the corpus."""
    from kdrecipe.data.tokens import Tokenizer

    mine = Tokenizer.load(layout.tokens)
    if bundle.meta["vocab_id"] != mine.vocab_id:
        raise RecipeError(
            f"the bundle's tokens ({len(bundle.tokens)}) are not those that the recipe makes of its corpus "
            f"({len(mine)}), and {why}",
            where=recipe.document.where(("systems", system.name, "pretrained", "bundle")),
            remedy="set tokens and data as they were for the bundle, or use a loss on hidden states "
            "(hidden_mse) and no lm_weight",
        )


def _importer(recipe: Recipe, layout: Layout, system: System, seed: int):  # type: ignore[no-untyped-def]
    def run_import(out: Path) -> None:
        from kdrecipe.model.bundle import Bundle

        bundle = Bundle.load(Path(str(system.bundle)), recipe.plugins.registry)
        if why := _why_same_tokens(recipe, system):
            _refuse_other_tokens(recipe, layout, system, bundle, why)
        known = {sha256_file(path) for path in recipe.plugin_files if path.is_file()}
        # Those that were there when the recipe was read are known; this one has changed since.
        if strange := [path.name for path, digest in bundle.plugin_files.items() if digest not in known]:
            raise PluginError(refusal(bundle.path, strange))
        _ = bundle.model  # refuse a damaged one now, not after an hour
        out.mkdir(parents=True, exist_ok=True)
        for file in bundle.files:
            shutil.copyfile(file, out / file.name)
        write_json(
            out / "bundle.json", {**bundle.meta, "name": system.name, "kind": "pretrained", "seed": seed}
        )

    return run_import
