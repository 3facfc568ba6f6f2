"""Stage 4, before the targets: codebooks for the hidden states that some student is to predict.

::

    codebooks.json   which, of which teacher, and how well they describe its hidden states
    <tap>x<N>.pt     the tensors of each
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import fingerprint, read_json, sha256_file, write_atomic, write_json
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Batch, TargetSpec
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.teachers import Opened, open_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from kdrecipe.targets.quantiser import Quantiser

RECORD = "codebooks.json"
MAX_FRAMES = 40_000
"""Frames that they are trained on: at 25 per second, about half an hour."""
STEPS = 1000
"""In each of the two phases of training."""
TINY_STEPS = 20


def needed(recipe: Recipe, teacher: str) -> list[TargetSpec]:
    """The codebooks that students ask of a teacher."""
    from kdrecipe.stages.inputs import all_needs, students_of

    needs = all_needs(recipe, teacher, students_of(recipe, teacher))
    return [need for need in needs if need.kind == "codebooks"]


def job_name(teacher: str, seed: int) -> str:
    """Of the job."""
    return f"codebooks/{teacher}/seed{seed}"


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed that needs codebooks."""
    from kdrecipe.stages.inputs import model_plugins, students_of

    steps = TINY_STEPS if recipe.profile == "tiny" else STEPS
    for teacher in recipe.teaching():
        needs = needed(recipe, teacher)
        for seed in recipe.systems[teacher].seeds if needs else ():
            parts = {(s.data, s.unlabelled) for s in students_of(recipe, teacher)}
            plan.add(
                Job(
                    4,
                    job_name(teacher, seed),
                    layout.codebooks(teacher, seed),
                    {
                        "codebooks": [need.key for need in needs],
                        "parts": sorted(parts, key=str),
                        "model": model_plugins(recipe, teacher),
                        "steps": steps,
                    },
                    partial(run, recipe, layout, teacher, seed, steps),
                    ("features", "tokens", f"{teacher}/seed{seed}"),
                    alone=False,
                )
            )


def run(recipe: Recipe, layout: Layout, name: str, seed: int, steps: int, out: Path) -> None:
    """Train the codebooks on what the teacher makes of a part of the training audio."""
    import torch

    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.targets.quantiser import state_of, train_quantiser
    from kdrecipe.train.distribution import local_device

    tokens = Tokenizer.load(layout.tokens)
    opened, needs = open_teacher(recipe, layout, name, seed, tokens), needed(recipe, name)
    opened.load(local_device())
    frames = _frames(recipe, layout, opened, {need.source.key: need.source for need in needs})
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, object] = {"teacher": opened.hash, "codebooks": {}}
    errors: dict[str, float] = {}
    for need in needs:
        assert need.dim is not None
        quantiser, errors[need.key] = train_quantiser(frames[need.source.key], need.dim, steps=steps)
        buffer = io.BytesIO()
        torch.save(state_of(quantiser), buffer)
        write_atomic(out / _file(need), buffer.getvalue())
        print(
            f"  codebooks/{name}: {need.dim} of {need.tap} leave {errors[need.key]:.0%} of its variance, "
            f"{len(frames[need.source.key])} frames",
            flush=True,
        )
    record["codebooks"] = {key: {"unexplained": round(error, 4)} for key, error in errors.items()}
    write_json(out / RECORD, record)


def _file(need: TargetSpec) -> str:
    return f"{need.key.removeprefix('codebooks:')}.pt"


def _frames(
    recipe: Recipe, layout: Layout, opened: Opened, sources: dict[str, TargetSpec]
) -> dict[str, Tensor]:
    """Valid frames (M, D) of each hidden state, drawn over all speakers."""
    import torch

    from kdrecipe.frames import valid_frames
    from kdrecipe.targets.live import LiveTargets
    from kdrecipe.train.distribution import local_device

    found: dict[str, list[Tensor]] = {key: [] for key in sources}
    live, count = LiveTargets(opened.teacher, list(sources.values())), 0
    for batch in _heard(recipe, layout, opened):
        said = live.targets(batch.map(lambda x: x.to(local_device())))
        for key, spec in sources.items():
            hidden = said.hidden(spec.tap)
            found[key].append(valid_frames(hidden.values_BTD, hidden.lens_B).cpu())
        count += len(found[key][-1])
        if count >= MAX_FRAMES:
            break
    return {key: torch.cat(parts)[:MAX_FRAMES] for key, parts in found.items()}


def _heard(recipe: Recipe, layout: Layout, opened: Opened) -> Iterator[Batch]:
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.stages.inputs import students_of
    from kdrecipe.stages.session import training_data
    from kdrecipe.stages.teachers import heard

    cuts, _, _ = training_data(layout, students_of(recipe, opened.name))
    drawn = drawn_over_speakers(cuts)
    # a few at a time: batches are sorted by length, and the first of all would be the longest
    for i in range(0, len(drawn), 16):
        yield from heard(opened.teacher, drawn[i : i + 16], 60.0)


def with_codebooks(recipe: Recipe, layout: Layout, opened: Opened, seed: int) -> Opened:
    """The teacher with the codebooks that students ask of it, if they do.

    Raises:
        RecipeError: they were trained on another teacher's hidden states.
    """
    from kdrecipe.targets.quantiser import CodedTeacher

    needs = needed(recipe, opened.name)
    if not needs:
        return opened
    place = layout.codebooks(opened.name, seed)
    record = read_json(place / RECORD)
    if record["teacher"] != opened.hash:
        raise RecipeError(
            f"these codebooks are of another teacher than {opened.name!r}",
            where=str(place),
            remedy="run stage 4 again",
        )
    quantisers = {need.key: _load(place, need) for need in needs}
    hashes = [sha256_file(place / _file(need)) for need in needs]
    teacher: Any = CodedTeacher(opened.teacher, quantisers)
    return replace(opened, teacher=teacher, hash=fingerprint([opened.hash, *hashes]))


def _load(place: Path, need: TargetSpec) -> Quantiser:
    import torch

    from kdrecipe.targets.quantiser import from_state

    return from_state(torch.load(place / _file(need), map_location="cpu", weights_only=True))


def jobs_of(plan: Plan, teachers: Sequence[tuple[str, int]]) -> list[str]:
    """The codebook jobs of teachers and seeds that there are."""
    return [name for teacher in teachers if (name := job_name(*teacher)) in plan.jobs]
