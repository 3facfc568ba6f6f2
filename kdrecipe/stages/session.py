"""From a system of a recipe to a training run: its data, its objective, its teachers.

Teachers, students and fine-tuning under compression all train through :class:`Session`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import load_cuts
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import FRAME_KINDS, Batch, LossSetup, ModelInfo, TargetSpec
from kdrecipe.model.asr import model_info
from kdrecipe.model.bundle import Bundle
from kdrecipe.stages.inputs import needs_of
from kdrecipe.targets.cache import TargetCache
from kdrecipe.targets.live import LiveTargets
from kdrecipe.train.loop import Objective, TargetSource, Term, TrainResult, train

if TYPE_CHECKING:
    from lhotse.cut import CutSet

    from kdrecipe.model.asr import AsrModel
    from kdrecipe.recipe.load import Recipe, System, Training
    from kdrecipe.stages.layout import Layout


@dataclass
class Session:
    """All that is needed to train one system with one seed.

    Args:
        recipe: the recipe.
        layout: where its artefacts lie.
        system: the system, trained or distilled.
        seed: seed of initialisation, order of the data and augmentation.
    """

    recipe: Recipe
    layout: Layout
    system: System
    seed: int

    @cached_property
    def tokens(self) -> Tokenizer:
        """The recipe's tokens."""
        return Tokenizer.load(self.layout.tokens)

    @cached_property
    def subsets(self) -> dict[str, list[str]]:
        """Cut ids of every named subset of the training split."""
        found: dict[str, list[str]] = json.loads((self.layout.features / "subsets.json").read_text())
        return found

    @cached_property
    def cuts(self) -> CutSet:
        """The training split with its perturbed copies."""
        return load_cuts(self.layout.features, "train")

    def batches(self, training: Training) -> CutBatches:
        """The training data; where only a part is labelled, both parts, the labels withheld."""
        left_out = set(json.loads((self.layout.tokens / "left_out.json").read_text()))
        labelled = set(self.subsets[self.system.data]) if self.system.data else None
        unlabelled = set(self.subsets[self.system.unlabelled]) if self.system.unlabelled else set()

        def wanted(cut: Any) -> bool:
            if cut.id in left_out:
                return cut.id in unlabelled
            return labelled is None or cut.id in labelled or cut.id in unlabelled

        return CutBatches(
            self.cuts.filter(wanted).to_eager(),
            self.tokens,
            batch_duration_s=training.batch_duration_s,
            seed=self.seed,
            labelled_ids=labelled,
            shuffle=True,
        )

    @cached_property
    def dev(self) -> CutBatches | None:
        """The development data, if the corpus has any."""
        if not (self.layout.features / "dev.jsonl.gz").exists():
            return None
        cuts = load_cuts(self.layout.features, "dev")
        return CutBatches(cuts, self.tokens, batch_duration_s=120.0, seed=0, labelled_ids=None, shuffle=False)

    def calibration(self, num_batches: int) -> Iterator[Batch]:
        """The first training batches, for compressors that look at activations."""
        batches = self.batches(self.system.training)
        for ids in batches.epoch(0)[:num_batches]:
            yield batches.load(ids)

    @cached_property
    def teacher_bundles(self) -> dict[str, Bundle]:
        """The teachers' bundles by system name."""
        registry = self.recipe.plugins.registry
        return {
            name: Bundle.load(self.layout.system(name, self.recipe.seed_of(name, self.seed)), registry)
            for name in self.system.teachers
        }

    def objective(self, student: ModelInfo) -> Objective:
        """The weighted terms; a term that names no teacher is shared evenly among all.

        Terms of one loss are told apart by what they learn from: ``kl:attention``, ``kl:ctc``.

        Raises:
            RecipeError: a teacher can't give what a loss needs.
        """
        registry = self.recipe.plugins.registry
        terms = []
        count = Counter(term.name for term in self.system.terms)
        for term in self.system.terms:
            cls = registry.get("losses", term.name)
            config = cls.Config.model_validate(term.options)
            needs = list(cls.requires(config)) if hasattr(cls, "requires") else []
            if not needs:
                terms.append(Term(term.name, term.weight, cls(config, LossSetup(student)), None))
                continue
            names = [term.teacher] if term.teacher else list(self.system.teachers)
            loss_name = term.name if count[term.name] == 1 else f"{term.name}:{needs[0].tap}"
            for name in names:
                teacher = self.teacher_bundles[name].info
                self._check(term.name, needs, student, name, teacher)
                loss = cls(config, LossSetup(student, teacher))
                label = loss_name if len(names) == 1 else f"{loss_name}@{name}"
                terms.append(Term(label, term.weight / len(names), loss, name))
        return Objective(terms)

    def _check(
        self, loss: str, needs: list[TargetSpec], student: ModelInfo, name: str, teacher: ModelInfo
    ) -> None:
        offered = {spec.key: spec for spec in teacher.provides()}
        for need in needs:
            spec = pinned(need, student)
            gives = offered.get(need.key)
            problem = f"needs {need.key}" if gives is None else spec.mismatch(gives)
            if problem:
                raise RecipeError(
                    f"loss {loss!r} can't learn from teacher {name!r}: {problem}",
                    where=f"systems.{self.system.name}",
                    remedy=f"the teacher offers {', '.join(sorted(offered))}",
                )

    def needs_of(self, teacher: str) -> list[TargetSpec]:
        """What this system's losses ask of one teacher."""
        return needs_of(self.recipe, self.system, teacher)

    def teachers(self, device: str) -> dict[str, TargetSource]:
        """Where the targets come from: the cache of stage 4, or the teacher itself."""
        sources: dict[str, TargetSource] = {}
        for name, bundle in self.teacher_bundles.items():
            specs = self.needs_of(name)
            if not specs:
                continue
            if self.recipe.caches(name):
                place = self.layout.targets(name, self.recipe.seed_of(name, self.seed))
                key = target_key(bundle, self.recipe)
                sources[name] = TargetCache.open(place, key, specs=specs, cuts=self.cuts)
            else:
                sources[name] = LiveTargets(bundle.model.to(device), specs)
        return sources

    def run(
        self,
        model: AsrModel,
        work_dir: Path,
        training: Training,
        *,
        on_step: Callable[[nn.Module, int, int], None] | None = None,
    ) -> TrainResult:
        """Train ``model`` in place."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        objective = self.objective(model_info(model, self.tokens.vocab_id))
        hook = self.recipe.plugins.pm.hook
        return train(
            model,
            self.batches(training),
            objective,
            self.teachers(device),
            training,
            work_dir,
            seed=self.seed,
            dev=self.dev,
            on_step=on_step,
            # Beside others, the process that started this one says whose lines these are.
            label="" if os.environ.get("KDRECIPE_PARENT") else f"{self.system.name}/seed{self.seed}",
            build_optimizer=hook.build_optimizer,
            train_metrics=hook.train_metrics,
        )


def pinned(need: TargetSpec, student: ModelInfo) -> TargetSpec:
    """A need with what follows from the student filled in: frames must fall together, and logits
    must count in the same vocabulary."""
    from dataclasses import replace

    if need.kind in FRAME_KINDS:
        need = replace(need, frame_shift_s=need.frame_shift_s or student.frame_shift_s)
    if need.kind in ("frame_logits", "token_logits", "rnnt_lattice"):
        need = replace(need, dim=student.vocab_size, vocab_id=student.vocab_id)
    return need


def target_key(bundle: Bundle, recipe: Recipe) -> dict[str, Any]:
    """What cached targets depend on, besides the audio: teacher, tokens, features."""
    return {
        "teacher": bundle.hash,
        "tokens": bundle.meta["vocab_id"],
        "features": recipe.features.model_dump(mode="json"),
    }
