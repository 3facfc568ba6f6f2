"""Whether teachers can give what losses need: asked of plugins, on models that are built for the purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kdrecipe.errors import KdrecipeError, Problem, RecipeError, did_you_mean
from kdrecipe.interfaces import (
    ALIGNABLE_KINDS,
    VOCABULARY_KINDS,
    LossSetup,
    ModelInfo,
    TargetSpec,
)
from kdrecipe.plugin.loader import reason
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.bundles import other_tokens
from kdrecipe.recipe.checks import Checker
from kdrecipe.recipe.imported import build_teacher, teacher_options, tokenizer_file
from kdrecipe.recipe.sections import EMA, Features, System, Term, Tokens, uses_lm
from kdrecipe.recipe.suitable import bundle_model, model_of, searches

FEATURE_FRAME_SHIFT_S = 0.01
MAX_TENSORS = 10_000
"""Of a model: far more than any has that trains here."""
OTHER_RATE = "name a way with align: mean, stride or interpolate, or give both the same subsampling"


class FitChecker:
    """Whether teachers can give what losses need, asked of models built for the purpose."""

    def __init__(self, checker: Checker, features: Features, tokens: Tokens) -> None:
        self.checker = checker
        self.features = features
        self.tokens = tokens
        self.vocab_size = tokens.vocab_size or 32  # characters are counted in stage 2
        self._infos: dict[str, ModelInfo | None] = {}
        self._specs: dict[str, list[TargetSpec] | None] = {}  # of imported teachers; None: not known
        self._with_tokens: set[str] = set()  # those whose tokens a recipe may take

    def check(self) -> None:
        """Every term of every system against each of its teachers."""
        for system in self.checker.systems.values():
            if system.is_imported:
                self._imported_info(system)
        for system in self.checker.systems.values():
            student = self._info(system)
            if student is None:
                continue
            for i, term in enumerate(system.terms):
                for problem in self._misfits(system, term, student):
                    parser, path = self.checker.parser, self.checker._path(system, "losses", i)
                    parser.problem(path, problem.what, problem.remedy)

        self._language_model()

    def _language_model(self) -> None:
        """A bundle with its own tokens can't be searched with a language model over the recipe's."""
        decoders, registry = self.checker.decode.decoders, self.checker._registry
        for system in self.checker.systems.values():
            heads = list((bundle_model(system) or {}).get("heads", ())) if system.kind == "pretrained" else []
            why = self._other_tokens(system.name)
            for label, decoder in searches(heads, decoders, registry).items() if heads and why else ():
                if uses_lm(decoder.options):
                    what = f"the language model is over the recipe's tokens, and {system.name!r} has {why}"
                    remedy = "set tokens as they were for the bundle, or lm_weight: 0"
                    self.checker.parser.problem(("decode", "decoders", label, "lm_weight"), what, remedy)

    def _misfits(self, system: System, term: Term, student: ModelInfo) -> Iterator[Problem]:
        """What is wrong between a term, its student and each of its teachers, one problem for each."""
        needs = self.checker.requires(term)
        names = ([term.teacher] if term.teacher else list(system.all_teachers)) if needs else []
        # a bundle that is not there yet is None: not known
        infos = {n: student if n == EMA else self._info(self.checker.systems[n]) for n in names}
        known = {name: info for name, info in infos.items() if info is not None}
        unmet = {name: self._unmet(term, needs, student, name, info) for name, info in known.items()}
        problems = [problem for problem in unmet.values() if problem is not None]
        setups = [LossSetup(student, info) for name, info in known.items() if unmet[name] is None]
        if not names:
            setups = [LossSetup(student)]
        elif self.checker.takes_all(term):
            setups = [LossSetup(student, teachers=known)] if len(known) == len(names) and not problems else []
        yield from problems
        yield from (problem for setup in setups if (problem := self._unbuilt(term, setup)) is not None)

    def _unmet(
        self, term: Term, needs: list[TargetSpec], student: ModelInfo, name: str, teacher: ModelInfo
    ) -> Problem | None:
        """What a teacher can't give."""
        offered = self._offered(name, teacher)
        for need in needs:
            gives = need.among(offered)
            if gives is None:
                key = need.source.key
                remedy = did_you_mean(key, offered)
                return Problem(f"{term.name!r} needs {key}, the teacher {name!r} lacks it", "", remedy)
            if need.kind in VOCABULARY_KINDS and (why := self._other_tokens(name)) is not None:
                remedy = "set tokens as they were for the bundle, or use a loss on hidden states (hidden_mse)"
                return Problem(f"{term.name!r} compares tokens, and {name!r} has {why}", "", remedy)
            if name and (problem := self._own_vocabulary(name, need)) is not None:
                return replace(problem, what=f"{term.name!r} compares tokens, and {problem.what}")
            if (why := student.pinned(need).mismatch(gives)) is not None:
                options = self.checker._registry.get("losses", term.name).Config.model_fields
                remedy = "teacher and student need equal subsampling" if "shift" in why else ""
                if remedy and need.kind in ALIGNABLE_KINDS and "align" in options:
                    remedy = OTHER_RATE
                remedy = "align: interpolate takes any two rates" if "whole number" in why else remedy
                return Problem(f"{term.name!r} can't learn from {name!r}: {why}", "", remedy)
        return None

    def _unbuilt(self, term: Term, setup: LossSetup) -> Problem | None:
        """Why a loss refuses the models that it stands between."""
        cls = self.checker._registry.get("losses", term.name)
        try:
            with _uninitialised():
                cls(cls.Config.model_validate(term.options), setup)
        except KdrecipeError as error:
            return Problem(error.problems[0].what, "", error.problems[0].remedy)
        except Exception as error:
            return Problem(f"{term.name!r} can't be built: {reason(error)}")
        return None

    def _own_vocabulary(self, name: str, need: TargetSpec) -> Problem | None:
        """Why an imported teacher's posteriors are over other tokens than those that stage 2 will make."""
        owner = self.tokens.teacher
        if name == EMA or need.kind not in VOCABULARY_KINDS or not self.checker.systems[name].is_imported:
            return None
        remedy = "use a loss on hidden states (hidden_mse), or its hypotheses (unlabelled: {labels: ...})"
        if name in self._with_tokens:
            remedy = f"tokens: {{name: from_teacher, teacher: {name}}}, or {remedy}"
        if owner is None:
            what = f"{name!r} has byte-level BPE of its own, the recipe {self.tokens.name}"
            return Problem(what, "", remedy) if name in self._with_tokens else None
        if name == owner or self._specs.get(owner) is None:
            return None
        if need.kind == "token_logits" and self._list_of(name) & self._list_of(owner):
            return None
        return Problem(f"{name!r} counts in a list of its own, the recipe in that of {owner!r}", "", remedy)

    def _list_of(self, name: str) -> set[str | None]:
        """What identifies the tokens of an imported teacher's decoder."""
        return {spec.vocab_id for spec in self._specs.get(name) or () if spec.kind == "token_logits"}

    def _offered(self, name: str, teacher: ModelInfo) -> dict[str, TargetSpec]:
        """What a teacher gives by key. Which tokens stage 2 will make is not known: a list of an imported
        teacher's is compared when it is there, and its size now where the recipe says one."""
        if name == EMA or not self.checker.systems[name].is_imported:
            return {spec.key: spec for spec in teacher.provides()}
        known = self.tokens.name in ("bpe", "unigram")
        return {
            spec.key: replace(spec, vocab_id=None, dim=spec.dim if known or spec.vocab_id is None else None)
            for spec in self._specs[name] or ()
        }

    def _other_tokens(self, name: str) -> str | None:
        system = self.checker.systems.get(name)  # none of the average's own
        if system is None or system.is_imported:
            return None
        return other_tokens(system, self.tokens) if system.kind == "pretrained" else None

    def _info(self, system: System) -> ModelInfo | None:
        """What losses may know of a system's model; None where that can't be known yet."""
        if system.is_imported:
            return self._imported_info(system)
        model = model_of(self.checker.systems, system.name)
        if model is None:
            return None
        key = json.dumps(model, sort_keys=True)
        if key not in self._infos:
            self._infos[key] = None
            try:
                self._infos[key] = self._build(model)
            except Exception as error:
                what = f"a model of architecture {model['name']!r} can't be built: {reason(error)}"
                self.checker._problem(system, () if system.model is None else ("model",), what)
        return self._infos[key]

    def _imported_info(self, system: System) -> ModelInfo | None:
        """By what its plugin says; None while an environment variable is not set, or where that failed."""
        registry = self.checker._registry
        if system.name not in self._specs:
            self._specs[system.name] = None
            try:
                teacher_options(registry, system)
            except RecipeError:
                return None  # an environment variable: looked up when there is work
            try:
                teacher = build_teacher(registry, system)
                self._specs[system.name] = list(teacher.provides())
                if tokenizer_file(teacher) is not None:
                    self._with_tokens.add(system.name)
            except KdrecipeError as error:
                self.checker.parser.problems += error.problems
            else:
                self._check_bins(system, getattr(teacher, "num_mel_bins", None))
        specs = self._specs[system.name]
        return None if specs is None else replace(ModelInfo.of_specs(specs), vocab_id="the recipe's")

    def _check_bins(self, system: System, bins: int | None) -> None:
        """A teacher that hears features hears the recipe's."""
        mine = self.features.num_mel_bins
        if bins is not None and bins != mine:
            what = f"hears {bins} mel bins, the recipe has {mine}"
            self.checker._problem(system, (), what, f"set features: {{num_mel_bins: {bins}}}")

    def _build(self, model: Mapping[str, Any]) -> ModelInfo:
        registry = self.checker._registry
        encoder = build_encoder(registry, model, self.features.num_mel_bins)
        heads = {}
        with _uninitialised():
            for name, options in model["heads"].items():
                head = registry.get("heads", name)
                heads[name] = head(head.Config.model_validate(options), encoder.output_dim, self.vocab_size)
        return ModelInfo.of_model("the recipe's", self.vocab_size, encoder, heads, FEATURE_FRAME_SHIFT_S)


def build_encoder(registry: Registry, model: Mapping[str, Any], num_mel_bins: int) -> Any:
    """The encoder that ``model`` (its description) names, weights not initialised: to be asked, not run."""
    options = {k: v for k, v in model.items() if k not in ("name", "heads")}
    cls = registry.get("architectures", model["name"])
    with _uninitialised():
        return cls(cls.Config.model_validate(options), num_mel_bins)


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Modules built within keep random weights unset: their memory is never touched.

    Not torch's ``meta`` device: some operations on it import torch's compiler, which takes longer
    than all else that ``kdrecipe check`` does.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    random = (torch.Tensor.uniform_, torch.Tensor.normal_)

    class SkipRandom(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func in random else func(*args, **(kwargs or {}))

    with torch.random.fork_rng(devices=[]), SkipRandom(), few_tensors():
        yield


@contextmanager
def few_tensors() -> Iterator[None]:
    """KdrecipeError for a model that would be built until the memory is full (num_layers: 100000000)."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    num_tensors = 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal num_tensors
        num_tensors += 1
        if num_tensors > MAX_TENSORS:
            raise KdrecipeError(f"it has more than {MAX_TENSORS} weight tensors")

    counting = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()
