"""From a system of a recipe to a training run: its data, its objective, its teachers.

Teachers, students and fine-tuning under compression all train through :class:`Session`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kdrecipe.artifacts import read_json
from kdrecipe.corpus.subsets import drawn_over_speakers
from kdrecipe.data.augment import Augmenter, NoiseFiles
from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import FRAME_SHIFT_S, extract, has_dev, load_cuts, load_norm
from kdrecipe.data.stored_cuts import Chosen, StoredCuts
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError, RecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Batch, LossSetup, ModelInfo, TargetSpec
from kdrecipe.jobs.executors import job_label
from kdrecipe.model.asr import FeatureNorm, build_model, model_info
from kdrecipe.recipe.sections import EMA, Location
from kdrecipe.recipe.terms import labels_of
from kdrecipe.stages.codebooks import with_codebooks
from kdrecipe.stages.inputs import needs_of, utterances_of
from kdrecipe.stages.labels import kept_of
from kdrecipe.stages.teachers import Opened, open_teacher
from kdrecipe.targets import TargetSource
from kdrecipe.targets.align import AlignedTargets
from kdrecipe.targets.cache import TargetCache
from kdrecipe.targets.live import LiveTargets
from kdrecipe.train.distribution import local_device
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.evaluation import token_error_rate
from kdrecipe.train.gradients import gradients
from kdrecipe.train.loop import Objective, Term, TrainResult, train

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
    labels_report: dict[str, Any] = field(default_factory=dict, init=False)
    """Of the hypotheses that are labels: how many were kept, and why the others were not."""

    @cached_property
    def tokens(self) -> Tokenizer:
        """The recipe's tokens."""
        return Tokenizer.load(self.layout.tokens)

    @cached_property
    def _data(self) -> tuple[StoredCuts | list[MonoCut], Set[str]]:
        """The training cuts that the system learns from, perturbed copies included; ids of the labelled."""
        cuts, labelled, unlabelled = training_data(self.layout, [self.system])
        if self.system.labels is not None:
            texts = self._said(unlabelled)
            cuts = cuts.with_texts(texts)
            said = (i for i, original in zip(cuts.ids, cuts.original_ids(), strict=True) if original in texts)
            labelled = labelled | cuts.chosen(said)
        if self.max_audio_s is not None:
            return list(_first(drawn_over_speakers(cuts), self.max_audio_s)), labelled
        return cuts, labelled

    def _said(self, unlabelled: Set[str]) -> dict[str, str]:
        """Utterance -> what a teacher recognised, of those that are labels; says how many that are."""
        assert self.system.labels is not None
        assert self.system.keep is not None
        seed = self.recipe.seed_of(self.system.labels, self.seed)
        kept, texts = kept_of(self.layout, self.system.labels, seed, self.system.keep, unlabelled)
        for line in kept.lines():
            print(f"  {self.system.name}/seed{self.seed}: {line}", flush=True)
        self.labels_report = {
            "teacher": self.system.labels,
            "kept": len(kept.kept),
            "dropped": len(kept.dropped),
            "kept_s": kept.duration_s,
            "all_s": kept.all_s,
            "reasons": {reason: n["first"] for reason, n in kept.counts().items() if n["first"]},
        }
        return texts

    @cached_property
    def heard(self) -> Collection[str] | None:
        """Utterances that it trains on, with labels or without; None: the whole training split."""
        if self.system.data is None:
            return None
        cuts = self._data[0]
        return cuts.all() if isinstance(cuts, StoredCuts) else {cut.id for cut in cuts}

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

    def batches(self, training: Training, *, with_audio: bool = False) -> CutBatches:
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
            with_audio=with_audio,
        )

    def _augmenter(self, training: Training) -> Augmenter | None:
        """What makes scenes of utterances, which begin at whole frames of the student and of its teachers."""
        options = training.augment
        if options is None:
            return None
        given = [spec for opened in self.opened.values() for spec in opened.provides().values()]
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

    def gradients(self, model: AsrModel, num_batches: int) -> Iterator[Batch]:
        """What some training batches, the same ones at each call, teach ``model``, which is on this process's
        device: see :class:`kdrecipe.interfaces.CompressContext`."""
        device = local_device()
        plain = self.system.training.model_copy(update={"augment": None})
        sources = self.teachers(device, model)
        with_audio = any(getattr(source, "hears_audio", False) for source in sources.values())
        batches = self.batches(plain, with_audio=with_audio)
        objective = self.objective(model_info(model, self.tokens.vocab_id))
        objective.labelled_share = batches.num_labelled / len(batches)
        loaded = (batches.load(ids) for ids in batches.epoch(0)[:num_batches])
        return gradients(model, loaded, objective, sources, device)

    def token_errors(self, model: AsrModel) -> float:
        """Per reference token of dev; KdrecipeError where there is none with transcripts."""
        rate = token_error_rate(model, self.dev, local_device()) if self.dev is not None else None
        if rate is None:
            raise KdrecipeError(
                "dev errors are wanted, and the corpus has no dev split with transcripts",
                where=f"systems.{self.system.name}",
                remedy="give it one, or choose options that need none",
            )
        return rate

    @cached_property
    def opened(self) -> dict[str, Opened]:
        """The teachers by system name."""
        opened = {}
        for name in self.system.teachers:
            seed = self.recipe.seed_of(name, self.seed)
            bare = open_teacher(self.recipe, self.layout, name, seed, self.tokens)
            opened[name] = with_codebooks(self.recipe, self.layout, bare, seed)
        return opened

    def objective(self, student: ModelInfo) -> Objective:
        """The weighted terms; a term that names no teacher is shared evenly among all.

        Terms of one loss are distinguished by what they learn from: ``kl:attention``, ``kl:ctc``.

        Raises:
            RecipeError: a teacher can't give what a loss needs.
        """
        registry = self.recipe.plugins.registry
        terms = []
        losses = [registry.get("losses", term.name) for term in self.system.terms]
        configs = [
            cls.Config.model_validate(t.options) for cls, t in zip(losses, self.system.terms, strict=True)
        ]
        needs = [
            list(cls.requires(config)) if hasattr(cls, "requires") else []
            for cls, config in zip(losses, configs, strict=True)
        ]
        labels = labels_of(self.system.terms, needs)
        for term, cls, config, asks, label in zip(
            self.system.terms, losses, configs, needs, labels, strict=True
        ):
            names = ([term.teacher] if term.teacher else list(self.system.all_teachers)) if asks else []
            for name in names:
                self._check(term.name, asks, student, name)
            infos = {name: student if name == EMA else self.opened[name].info for name in names}
            if not names:
                loss = cls(config, LossSetup(student))
                terms.append(Term(label, term.weight, loss, start_below=term.start_below))
            elif getattr(cls, "all_teachers", False):
                loss = cls(config, LossSetup(student, teachers=infos))
                all_of = Term(label, term.weight, loss, None, term.start_below, all_teachers=tuple(names))
                terms.append(all_of)
            else:
                for name, info in infos.items():
                    loss = cls(config, LossSetup(student, info))
                    full = label if len(names) == 1 else f"{label}@{name}"
                    terms.append(Term(full, term.weight / len(names), loss, name, term.start_below))
        return Objective(terms)

    def _check(self, loss: str, needs: list[TargetSpec], student: ModelInfo, name: str) -> None:
        own = {spec.key: spec for spec in student.provides()}
        offered = own if name == EMA else self.opened[name].provides()
        for need in needs:
            spec = student.pinned(need)
            gives = need.among(offered)
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

    def teachers(self, device: torch.device, student: AsrModel) -> dict[str, TargetSource]:
        """Where the targets come from: the cache of stage 4, or the teacher itself, on ``device``.

        Those that have other frames than the student are brought to its own.
        """
        sources: dict[str, TargetSource] = {}
        info = model_info(student, self.tokens.vocab_id)
        for name, opened in self.opened.items():
            needs = [info.pinned(need) for need in self.needs_of(name)]
            if not needs:
                continue
            source = self._source(opened, device)
            if any(need.align is not None for need in needs):
                by_key = {need.key: need for need in needs}
                offered = opened.provides()
                gives = {key: its for key, need in by_key.items() if (its := need.among(offered))}
                source = AlignedTargets(source, by_key, gives, student.frames_of)
            sources[name] = source
        if self.system.ema is not None and (needs := self.needs_of(EMA)):
            specs = [replace(info.pinned(need), align=None) for need in needs]
            sources[EMA] = MovingAverage(self.system.ema.decay, specs)
        return sources

    def _source(self, opened: Opened, device: torch.device) -> TargetSource:
        specs = [replace(need, align=None) for need in self.needs_of(opened.name)]
        if self.recipe.caches(opened.name, self.system):
            place = self.layout.targets(opened.name, self.recipe.seed_of(opened.name, self.seed))
            key = target_key(opened, self.recipe)
            return TargetCache.open(place, key, specs=specs, cuts=self._data[0])
        opened.load(device)
        return LiveTargets(opened.teacher, specs)

    def run(
        self,
        model: AsrModel,
        work_dir: Path,
        training: Training,
        *,
        on_step: Callable[[nn.Module, int, int], None] | None = None,
        penalty: Callable[[nn.Module, int, int], torch.Tensor] | None = None,
    ) -> TrainResult:
        """Train ``model`` in place, on this process's device; teachers at work are there, too."""
        device = local_device()
        objective = self.objective(model_info(model, self.tokens.vocab_id))
        hook = self.recipe.plugins.pm.hook
        teachers = self.teachers(device, model)
        result = train(
            model,
            self.batches(
                training,
                with_audio=any(getattr(source, "hears_audio", False) for source in teachers.values()),
            ),
            objective,
            teachers,
            training,
            work_dir,
            seed=self.seed,
            dev=self.dev,
            on_step=on_step,
            penalty=penalty,
            label=job_label(f"{self.system.name}/seed{self.seed}"),
            masked_teachers=self.system.targets.view == "masked",
            build_optimizer=hook.build_optimizer,
            train_metrics=hook.train_metrics,
            device=str(device),
        )
        for name, source in teachers.items():
            if isinstance(source, AlignedTargets):
                for line in source.said():
                    print(f"  {self.system.name}/seed{self.seed}: {name}, {line}", flush=True)
        return result


def _first(cuts: Sequence[MonoCut], seconds: float) -> Sequence[MonoCut]:
    """The first cuts that together last so long, the last one included."""
    ends_s = np.cumsum([cut.duration for cut in cuts])
    return cuts[: int(np.searchsorted(ends_s, seconds)) + 1]


def training_data(layout: Layout, systems: Iterable[System]) -> tuple[StoredCuts, Chosen, Chosen]:
    """The training cuts that ``systems`` learn from, perturbed copies included.

    Returns:
        The cuts; ids of those that some of the systems see with their labels; of those that some see
        without.
    """
    cuts = load_cuts(layout.features, "train")
    subsets = read_json(layout.features / "subsets.json")
    place = layout.tokens / "left_out.json"
    left_out = read_json(place) if place.exists() else []  # before there are tokens, nothing is
    labelled = unlabelled = cuts.chosen(())
    for system in systems:
        with_labels, without = utterances_of(system, cuts, subsets, left_out)
        labelled, unlabelled = labelled | with_labels, unlabelled | without
    return cuts.select(labelled | unlabelled), labelled, unlabelled


def target_key(opened: Opened, recipe: Recipe) -> dict[str, Any]:
    """What cached targets depend on, besides the audio: teacher, tokens, features."""
    return {
        "teacher": opened.hash,
        "tokens": opened.vocab_id,
        "features": recipe.features.model_dump(mode="json"),
    }
