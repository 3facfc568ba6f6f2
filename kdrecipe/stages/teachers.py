"""Teachers as the stages use them: bundles and what plugins import, by one interface.

Stage 3 writes of an imported teacher what identifies it, not its weights::

    teacher.json    plugin and options, hashes of its files, what it provides, parameters, size
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kdrecipe.artifacts import fingerprint, read_json, sha256_file, write_json
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Batch, Hypothesis, ModelInfo, TargetSpec, Teacher, TokenTeacher
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.imported import build_teacher, same_tokens, tokenizer_file
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    import torch
    from lhotse.cut import MonoCut

    from kdrecipe.data.tokens import Tokenizer

RECORD = "teacher.json"


@dataclass
class Opened:
    """A teacher of stage 3, its weights not loaded before :meth:`Teacher.load`.

    Args:
        name: of its system.
        teacher: what speaks.
        info: what losses may know of it.
        hash: identifies its weights and all else that determines what it says.
        vocab_id: of the tokens that it counts in; empty without any.
    """

    name: str
    teacher: Teacher
    info: ModelInfo
    hash: str
    vocab_id: str
    _device: torch.device | None = None

    def load(self, device: torch.device) -> None:
        """Make it ready on ``device``, unless it is."""
        if device != self._device:
            self.teacher.load(device)
            self._device = device

    def provides(self) -> dict[str, TargetSpec]:
        """What it gives, by key."""
        return {spec.key: spec for spec in self.teacher.provides()}


def open_teacher(
    recipe: Recipe, layout: Layout, name: str, seed: int, tokens: Tokenizer | None = None
) -> Opened:
    """The teacher of one seed, which stage 3 has built or imported.

    Args:
        recipe: the recipe.
        layout: where its artefacts are.
        name: of the teacher's system.
        seed: one of its seeds.
        tokens: the recipe's, for a teacher from whose own they were trimmed to count in.

    Raises:
        RecipeError: the files of an imported one are not those of stage 3.
    """
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.targets.live import ModelTeacher

    system, place = recipe.systems[name], layout.system(name, seed)
    if not system.is_imported:
        bundle = Bundle.load(place, recipe.plugins.registry)
        teacher = ModelTeacher.of_bundle(bundle)
        return Opened(name, teacher, bundle.info, bundle.hash, bundle.meta["vocab_id"])
    record, imported = read_json(place / RECORD), build_teacher(recipe.plugins.registry, system)
    sizes = {name: path.stat().st_size for name, path in _named(imported).items()}
    if sizes != {name: size for name, (_, size) in record["files"].items()}:
        raise RecipeError(
            f"the files of {name!r} have changed since stage 3 imported it",
            where=system.location.where if system.location else "",
            remedy="run stage 3 again",
        )
    digest = record["hash"]
    if tokens is not None and tokens.origin is not None and _lends_tokens(recipe, imported):
        from kdrecipe.stages.labels import form_of
        from kdrecipe.targets.trimmed import TrimmedTeacher

        form = form_of(recipe, layout, system)
        trimmed = TrimmedTeacher(cast("TokenTeacher", imported), tokens, form.apply)
        imported = cast("Teacher", trimmed)  # whose input is known only here
        digest = fingerprint([digest, form.model_dump(mode="json")])
    info = ModelInfo.of_specs(imported.provides())
    return Opened(name, imported, info, digest, info.vocab_id)


def _lends_tokens(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether the recipe's tokens were trimmed from a teacher's list."""
    if recipe.tokens.teacher is None or tokenizer_file(teacher) is None:
        return False
    owner = build_teacher(recipe.plugins.registry, recipe.systems[recipe.tokens.teacher])
    return same_tokens(teacher, owner)


def import_job(
    recipe: Recipe, layout: Layout, system: System, seed: int, stage: int, why_same_tokens: str | None
) -> Job:
    """Stage 3 or 5 for a teacher that a plugin imports.

    Args:
        recipe: the recipe.
        layout: where its artefacts are.
        system: the teacher.
        seed: of its row.
        stage: the number.
        why_same_tokens: why its tokens must be the recipe's; None: it may have its own.
    """
    assert system.plugin is not None
    registry = recipe.plugins.registry
    return Job(
        stage,
        f"{system.name}/seed{seed}",
        layout.system(system.name, seed),
        {
            "plugin": system.plugin.name,
            "options": system.plugin.options,
            "code": registry.fingerprint("teachers", system.plugin.name),
        },
        partial(_import, recipe, layout, system, seed, why_same_tokens),
        ("tokens",) if why_same_tokens else (),
        sources=lambda out: list(build_teacher(registry, system).files),
        alone=False,
    )


def _import(
    recipe: Recipe, layout: Layout, system: System, seed: int, why_same_tokens: str | None, out: Path
) -> None:
    import torch

    assert system.plugin is not None
    teacher = build_teacher(recipe.plugins.registry, system)
    if why_same_tokens is not None:
        _refuse_other_tokens(recipe, layout, system, teacher, why_same_tokens)
    teacher.load(torch.device("cpu"))  # refuse a damaged one now, not after an hour
    files = {name: (sha256_file(path), path.stat().st_size) for name, path in _named(teacher).items()}
    code = recipe.plugins.registry.fingerprint("teachers", system.plugin.name)
    provides = [asdict(spec) for spec in returned(teacher.provides(), list, system.plugin.name, "provides")]
    size_mb = sum(size for _, size in files.values()) / 1e6
    hashes = {name: digest for name, (digest, _) in files.items()}
    record = {
        "name": system.name,
        "kind": system.kind,
        "seed": seed,
        "plugin": system.plugin.name,
        "options": system.plugin.options,
        "files": files,
        "hash": fingerprint([hashes, system.plugin.options, code]),
        "provides": provides,
        "params": teacher.num_params,
        "size_mb": size_mb,
        "compression": [],
    }
    write_json(out / RECORD, record)
    size = f"{teacher.num_params / 1e6:.1f} M parameters, " if teacher.num_params else ""
    print(f"  {system.name}: {system.plugin.name}, {size}{size_mb:.0f} MB", flush=True)


def _refuse_other_tokens(recipe: Recipe, layout: Layout, system: System, teacher: Teacher, why: str) -> None:
    """What the check of the recipe can't know: which tokens stage 2 makes of the corpus."""
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.stages.inputs import all_needs, students_of

    mine = Tokenizer.load(layout.tokens)
    asked = {need.key for need in all_needs(recipe, system.name, students_of(recipe, system.name))}
    for spec in teacher.provides():
        if spec.key in asked and spec.vocab_id not in (None, mine.vocab_id):
            raise RecipeError(
                f"the {spec.dim} tokens of {system.name!r} are not the {len(mine)} that the recipe makes of "
                f"its corpus, and {why}",
                where=system.location.where if system.location else "",
                remedy="learn from its hypotheses (unlabelled: {labels: ...}) or hidden states (hidden_mse)",
            )


def _named(teacher: Teacher) -> dict[str, Path]:
    """A teacher's files by their names within the folder that holds all of them."""
    files = [Path(path).absolute() for path in teacher.files]
    folder = os.path.commonpath([path.parent for path in files]) if files else ""
    return {path.relative_to(folder).as_posix(): path for path in files}


def facts_of(layout: Layout, name: str, seed: int) -> dict[str, Any]:
    """What is recorded of a system's model: its ``bundle.json`` or ``teacher.json``."""
    place = layout.system(name, seed)
    facts: dict[str, Any] = read_json(place / (RECORD if (place / RECORD).exists() else "bundle.json"))
    return facts


def heard(teacher: Teacher, cuts: Sequence[MonoCut], batch_duration_s: float) -> Iterator[Batch]:
    """Batches of cuts as the teacher hears them, without labels, on the CPU."""
    from kdrecipe.data.batches import CutBatches

    batches = CutBatches(
        cuts,
        None,
        batch_duration_s=batch_duration_s,
        seed=0,
        shuffle=False,
        with_audio=teacher.input == "audio",
    )
    for ids in batches.epoch(0):
        yield batches.load(ids)


def hypotheses(
    teacher: Teacher,
    cuts: Sequence[MonoCut],
    device: torch.device,
    batch_duration_s: float,
) -> Iterator[tuple[str, Hypothesis]]:
    """Cut id and what the teacher recognises, batch by batch; it must be loaded onto ``device``."""
    import torch

    name = f"teacher {type(teacher).__name__}"
    for batch in heard(teacher, cuts, batch_duration_s):
        with torch.no_grad():
            found = teacher.hypotheses(batch.map(lambda x: x.to(device)))
        yield from zip(batch.ids, returned(found, list, name, "hypotheses"), strict=True)
