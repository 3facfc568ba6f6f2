"""From a system of a recipe to a training run: its data, its objective, its teachers.

Teachers, students and fine-tuning under compression all train through :class:`Session`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import CutSet
from torch import nn

from kdrecipe.artifacts import read_json
from kdrecipe.corpus.subsets import drawn_over_speakers
from kdrecipe.data.augment import Augmenter, NoiseFiles
from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import FRAME_SHIFT_S, extract, has_dev, load_cuts, load_norm
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Batch, LossSetup, ModelInfo, TargetSpec
from kdrecipe.model.asr import FeatureNorm, build_model, model_info
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.sections import Location
from kdrecipe.stages.inputs import needs_of, utterances_of
from kdrecipe.targets.cache import TargetCache
from kdrecipe.targets.live import LiveTargets
from kdrecipe.train.distribution import local_device
from kdrecipe.train.loop import Objective, TargetSource, Term, TrainResult, train

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

    from kdrecipe.model.asr import AsrModel
    from kdrecipe.recipe.load import Recipe, System, Training
    from kdrecipe.stages.layout import Layout


@dataclass
class Session:
    """All that is needed to train one system with one seed.

    Args:
        recipe: the recipe.
        layout: where its artefacts are.
        system: the system, trained or distilled.
        seed: seed of initialisation, order of the data and augmentation.
        max_audio_s: seconds of training data, drawn over all speakers; None: all of it.
    """

    recipe: Recipe
    layout: Layout
    system: System
    seed: int
    max_audio_s: float | None = None

    @cached_property
    def tokens(self) -> Tokenizer:
        """The recipe's tokens."""
        return Tokenizer.load(self.layout.tokens)

    @cached_property
    def _data(self) -> tuple[CutSet, set[str]]:
        """The training cuts that the system learns from, perturbed copies included; ids of the labelled."""
        cuts, labelled, _ = training_data(self.layout, [self.system])
        if self.max_audio_s is not None:
            cuts = CutSet.from_cuts(_first(drawn_over_speakers(cuts), self.max_audio_s))
        return cuts, labelled

    @cached_property
    def heard(self) -> set[str] | None:
        """Utterances that it trains on, with labels or without; None: the whole training split."""
        cuts: Any = self._data[0]  # Lhotse's annotations do not let it be iterated
        return None if self.system.data is None else {cut.id for cut in cuts}

    def new_model(self) -> AsrModel:
        """The system's model with random weights, normalised by the audio that it trains on."""
        assert self.system.model is not None  # imported ones are not trained
        torch.manual_seed(self.seed)
        model = build_model(
            self.system.model,
            input_dim=self.recipe.features.num_mel_bins,
            vocab_size=len(self.tokens),
            registry=self.recipe.plugins.registry,
        )
        model.norm = FeatureNorm.from_stats(
            *map(torch.from_numpy, load_norm(self.layout.features, self.heard))
        )
        return model

    def heard_audio(self, seconds: float, norm: FeatureNorm) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised features (T, F) and audio (S,) of training utterances, drawn over all speakers."""
        cuts = _first(drawn_over_speakers(self._data[0]), seconds)
        pairs = [
            (torch.from_numpy(cut.load_features()), torch.from_numpy(cut.load_audio()[0])) for cut in cuts
        ]
        return [(norm(features_TF[None])[0], samples_S) for features_TF, samples_S in pairs]

    def batches(self, training: Training) -> CutBatches:
        """The training data; where only a part is labelled, both parts, the labels withheld."""
        cuts, labelled = self._data
        features = self.recipe.features.model_dump()
        return CutBatches(
            cuts,
            self.tokens,
            batch_duration_s=training.batch_duration_s,
            seed=self.seed,
            labelled_ids=labelled,
            shuffle=True,
            augmenter=self._augmenter(training),
            extract=lambda samples_S: extract(samples_S, SAMPLE_RATE, features),
        )

    def _augmenter(self, training: Training) -> Augmenter | None:
        """What makes scenes of utterances, which begin at whole frames of the student and of its teachers."""
        options = training.augment
        if options is None:
            return None
        given = [spec for bundle in self.teacher_bundles.values() for spec in bundle.info.provides()]
        grid = math.lcm(*(round(s.frame_shift_s / FRAME_SHIFT_S) for s in given if s.frame_shift_s))
        noises = None
        if options.noises is not None:
            where = f"training.augment.noises of {self.system.name}"
            noises = NoiseFiles(Location(options.noises, where, self.recipe.dir).path())
        return Augmenter(options, grid, noises)

    @cached_property
    def dev(self) -> CutBatches | None:
        """The development data, if the corpus has any."""
        if not has_dev(self.layout.features):
            return None
        cuts = load_cuts(self.layout.features, "dev")
        return CutBatches(cuts, self.tokens, batch_duration_s=120.0, seed=0, labelled_ids=None, shuffle=False)

    def calibration(self, num_batches: int) -> Iterator[Batch]:
        """About so many batches of utterances drawn over all speakers, for compressors that look at
        activations: of dev, or of the training data of a corpus without dev."""
        on_dev, limit_s = has_dev(self.layout.features), self.system.training.batch_duration_s
        cuts, labelled = self._data
        drawn = drawn_over_speakers(load_cuts(self.layout.features, "dev") if on_dev else cuts)
        batches = CutBatches(
            _first(drawn, num_batches * limit_s),
            self.tokens,
            batch_duration_s=limit_s,
            seed=self.seed,
            labelled_ids=None if on_dev else labelled,
            shuffle=False,
        )
        for ids in batches.epoch(0):
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

        Terms of one loss are distinguished by what they learn from: ``kl:attention``, ``kl:ctc``.

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
                loss = cls(config, LossSetup(student))
                terms.append(Term(term.name, term.weight, loss, None, term.start_below))
                continue
            names = [term.teacher] if term.teacher else list(self.system.teachers)
            loss_name = term.name if count[term.name] == 1 else f"{term.name}:{needs[0].tap}"
            for name in names:
                teacher = self.teacher_bundles[name].info
                self._check(term.name, needs, student, name, teacher)
                loss = cls(config, LossSetup(student, teacher))
                label = loss_name if len(names) == 1 else f"{loss_name}@{name}"
                terms.append(Term(label, term.weight / len(names), loss, name, term.start_below))
        return Objective(terms)

    def _check(
        self, loss: str, needs: list[TargetSpec], student: ModelInfo, name: str, teacher: ModelInfo
    ) -> None:
        offered = {spec.key: spec for spec in teacher.provides()}
        for need in needs:
            spec = student.pinned(need)
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

    def teachers(self, device: torch.device) -> dict[str, TargetSource]:
        """Where the targets come from: the cache of stage 4, or the teacher itself, on ``device``."""
        sources: dict[str, TargetSource] = {}
        for name, bundle in self.teacher_bundles.items():
            specs = self.needs_of(name)
            if not specs:
                continue
            if self.recipe.caches(name):
                place = self.layout.targets(name, self.recipe.seed_of(name, self.seed))
                key = target_key(bundle, self.recipe)
                sources[name] = TargetCache.open(place, key, specs=specs, cuts=self._data[0])
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
        """Train ``model`` in place, on this process's device; teachers at work are there, too."""
        device = local_device()
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
            device=str(device),
        )


def _first(cuts: Sequence[MonoCut], seconds: float) -> Sequence[MonoCut]:
    """The first cuts that together last so long, the last one included."""
    ends_s = np.cumsum([cut.duration for cut in cuts])
    return cuts[: int(np.searchsorted(ends_s, seconds)) + 1]


def training_data(layout: Layout, systems: Iterable[System]) -> tuple[CutSet, set[str], set[str]]:
    """The training cuts that ``systems`` learn from, perturbed copies included.

    Returns:
        The cuts; ids of those that some of the systems see with their labels; of those that some see
        without.
    """
    cuts = load_cuts(layout.features, "train")
    subsets = read_json(layout.features / "subsets.json")
    left_out = read_json(layout.tokens / "left_out.json")
    labelled: set[str] = set()
    unlabelled: set[str] = set()
    for system in systems:
        with_labels, without = utterances_of(system, cuts.ids, subsets, left_out)
        labelled, unlabelled = labelled | with_labels, unlabelled | without

    def wanted(cut: Any) -> bool:
        return cut.id in labelled or cut.id in unlabelled

    return cuts.filter(wanted).to_eager(), labelled, unlabelled


def target_key(bundle: Bundle, recipe: Recipe) -> dict[str, Any]:
    """What cached targets depend on, besides the audio: teacher, tokens, features."""
    return {
        "teacher": bundle.hash,
        "tokens": bundle.meta["vocab_id"],
        "features": recipe.features.model_dump(mode="json"),
    }
