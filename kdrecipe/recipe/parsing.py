"""From a YAML document to the sections of a recipe, collecting everything that is wrong.

Each problem gets the line it is about. A part that is wrong is left out and the rest is still
looked at, so that all mistakes are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdrecipe.errors import did_you_mean
from kdrecipe.interfaces import Options
from kdrecipe.recipe.sections import (
    ALL,
    EMA,
    NONE,
    Claim,
    Corpus,
    Decode,
    Ema,
    Kind,
    Lm,
    Location,
    Named,
    Seeds,
    Subset,
    System,
    TargetOptions,
    Term,
    Training,
    depth_first,
)
from kdrecipe.recipe.suitable import head_of, heads_of, lineage, objective_of
from kdrecipe.recipe.system_sections import (
    OBJECTIVE,
    SECTIONS,
    CompressSection,
    TermSection,
    UnlabelledSection,
)
from kdrecipe.recipe.validation import Validator, short
from kdrecipe.recipe.yaml import KeyPath
from kdrecipe.score.keep import Keep
from kdrecipe.text_form import TextForm

KINDS: Mapping[str, Kind] = {
    "train": "trained",
    "distill": "distilled",
    "compress": "compressed",
    "pretrained": "pretrained",
}
"""Key within a system -> kind of system."""

SECTION_OF = {kind: key for key, kind in KINDS.items()}

TRIALS = "trials"
"""Beside the kind of a system: see :mod:`kdrecipe.recipe.trials`."""

TOP_KEYS = (
    "corpus", "features", "tokens", "lm", "seeds", "plugins", "training", "targets", "systems", "decode",
    "export", "parity", "claims", "profiles",
)  # fmt: skip

DEFAULT_EXPORTS = ("onnx_ctc", "onnx_transducer", "sherpa_attention", "onnx_attention", "torchscript")
"""Those of them that are installed and suit some system."""

EXAMPLES: Mapping[str, str] = {
    "corpus": '{name: an4, root: "${AN4_ROOT}"}',
    "tokens": "{name: bpe, vocab_size: 64}",
    "systems": "{student: {train: {model: {name: conformer, heads: {ctc: {}}}}}}",
}
"""What a recipe can't do without."""


class Parser(Validator):
    """Reads the parts of one document; :attr:`problems` grows meanwhile."""

    _targets: TargetOptions = TargetOptions()  # the recipe's

    # ------------------------------------------------------------ sections

    def top_keys(self) -> None:
        """Unknown and missing keys at the top."""
        for key in self.document.data:
            if key not in TOP_KEYS:
                self.problem((key,), "unknown key", did_you_mean(key, TOP_KEYS))
        for key, example in EXAMPLES.items():
            if self.document.data.get(key) is None:
                self.problem((), f"{key} is missing", f"for example {key}: {example}")

    def corpus(self) -> Corpus | None:
        """``corpus``; rules of subsets are checked one by one."""
        data, path = self.document.data.get("corpus"), ("corpus",)
        if data is None:
            return None
        core = tuple(f.alias or key for key, f in Corpus.model_fields.items() if not f.exclude)
        named = self.named("corpora", data, path, beside=core)
        own = {k: v for k, v in data.items() if k in core} if isinstance(data, dict) else {}
        section = self.validate(Corpus, own, path)
        subsets: dict[str, dict[str, Any]] = {}
        lists: dict[str, Location] = {}
        for name, rule in (section.subsets if section else {}).items():
            self._check_name(name, (*path, "subsets", name))
            if name in (ALL, NONE):
                meaning = "the whole training split" if name == ALL else "no utterance's transcript"
                self.problem((*path, "subsets", name), f"this name means {meaning}", "rename it")
            subset = self.validate(Subset, rule, (*path, "subsets", name))
            subsets[name] = subset.rule() if subset else {}
            if subset and subset.listed_in:
                lists[name] = self._location(subset.listed_in, (*path, "subsets", name, "listed_in"))
        if section is None:
            return None
        named = named or Named("")  # the subsets are still of use to the checks
        checked = {
            "location": self._place(section.location, (*path, "root")),
            "subsets": subsets,
            "name": named.name,
            "options": named.options,
            "lists": lists,
        }
        return section.model_copy(update=checked)

    def lm(self) -> Lm | None:
        """``lm``; None if it is absent."""
        if self.document.data.get("lm") is None:
            return None
        section = self.section(Lm, "lm")
        return section.model_copy(update={"text": self._place(section.text, ("lm", "text"))})

    def decode(self) -> Decode:
        """``decode``."""
        section = self.section(Decode, "decode")
        checked = {"decoders": self._decoders(section), "metrics": self._metrics(section)}
        return section.model_copy(update=checked)

    def _metrics(self, section: Decode) -> tuple[Named, ...]:
        """``decode.metrics``, those that could be read."""
        written: Sequence[Any] = section.metrics
        if "metrics" not in section.model_fields_set:
            written = [{"name": metric.name} for metric in section.metrics]
        found = [self.named("metrics", m, ("decode", "metrics", i)) for i, m in enumerate(written)]
        return tuple(m for m in found if m is not None)

    def _decoders(self, section: Decode) -> dict[str, Named]:
        """``decode.decoders``, those that could be read; one whose value is null is left out."""
        if "decoders" not in section.model_fields_set:
            names = [n for n in section.decoders if n in self.registry.names("decoders")]
            return {name: self._default("decoders", name) for name in names}
        found: dict[str, Named | None] = {}
        written: Mapping[str, Any] = section.decoders
        for label, data in written.items():
            path: KeyPath = ("decode", "decoders", label)
            if label == "name" and isinstance(data, str):
                remedy = f"write decoders: {{{data}: {{name: {data}}}}}"
                self.problem(path, "decoders maps labels of your own to decoders", remedy)
            elif data is not None:
                self._check_name(label, path)
                found[label] = self.named("decoders", data, path)
        return {label: named for label, named in found.items() if named is not None}

    def _default(self, kind: str, name: str) -> Named:
        """A plugin with its default options."""
        return Named(name, self.registry.config(kind, name).model_dump(mode="json", by_alias=True))

    def claims(self) -> tuple[Claim, ...]:
        """``claims``: a list of figures published elsewhere."""
        data = self.document.data.get("claims") or []
        if not isinstance(data, list):
            example = "write [{text: ..., system: ..., figure: wer, value: 6.5}]"
            self.problem(("claims",), f"is {short(data)}, it must be a list", example)
            return ()
        found = [self.validate(Claim, item, ("claims", i)) for i, item in enumerate(data)]
        return tuple(claim for claim in found if claim is not None)

    def exports(self, systems: Mapping[str, System]) -> tuple[Named, ...]:
        """``export``: a list of exporters, each named once; by default all shipped that suit a system."""
        data = self.document.data.get("export")
        if data is None:
            return self._default_exports(systems)
        if not isinstance(data, list):
            self.problem(("export",), f"is {short(data)}, it must be a list", "write [{name: onnx_ctc}]")
            return ()
        found = [self.named("exporters", item, ("export", i)) for i, item in enumerate(data)]
        names = [x.name if x else None for x in found]
        for i, name in enumerate(names):
            if name is not None and name in names[:i]:
                self.problem(("export", i), f"exporter {name!r} is listed twice")
        return tuple(x for x in found if x is not None)

    def _default_exports(self, systems: Mapping[str, System]) -> tuple[Named, ...]:
        heads = [heads_of(systems, name) for name in systems]
        installed = [n for n in DEFAULT_EXPORTS if n in self.registry.names("exporters")]
        if None not in heads:  # else any might suit the system that can't be looked into yet
            used = {head for found in heads if found for head in found}
            installed = [n for n in installed if head_of(self.registry, "exporters", n) in used]
        return tuple(self._default("exporters", name) for name in installed)

    def seeds(self) -> tuple[int, ...]:
        """``seeds``, of the recipe."""
        data = self.document.data.get("seeds", [1])
        return self._distinct(self.validate(_SeedList, {"seeds": data}, ()), ("seeds",)) or (1,)

    def _distinct(self, section: Any, path: KeyPath) -> tuple[int, ...] | None:
        seeds: tuple[int, ...] | None = getattr(section, "seeds", None)
        if seeds and len(set(seeds)) < len(seeds):
            self.problem(path, f"the same seed twice: {list(seeds)}", "each seed makes its own model")
        return seeds

    # ------------------------------------------------------------ systems

    def systems(
        self, seeds: tuple[int, ...], training: Training, targets: TargetOptions
    ) -> dict[str, System]:
        """``systems``, those that could be read; a system whose value is null is left out."""
        self._targets = targets
        data = self.document.data.get("systems")
        if data is None:
            return {}
        if not isinstance(data, dict) or not any(v is not None for v in data.values()):
            self.problem(("systems",), "must be a mapping with at least one system")
            return {}
        found = {n: self._system(n, v, seeds, training) for n, v in data.items() if v is not None}
        return self._inherit({n: s for n, s in found.items() if s is not None}, seeds)

    def _system(self, name: str, data: Any, seeds: tuple[int, ...], training: Training) -> System | None:
        path: KeyPath = ("systems", name)
        self._check_name(name, path)
        if name == EMA:
            self.problem(path, "as a teacher, this name means a student's own moving average", "rename it")
        if not isinstance(data, dict) or not data:
            self.problem(path, f"is {short(data)}", f"give it one of {', '.join(KINDS)}")
            return None
        for key in data:
            if key not in (*KINDS, TRIALS):
                self.problem((*path, key), "unknown kind of system", did_you_mean(key, KINDS))
        kinds = [key for key in data if key in KINDS]
        if len(kinds) > 1:
            both = " and ".join(kinds)
            self.problem(path, f"is both {both}", "a system has one kind: make two systems of it")
        if len(kinds) != 1:
            return None
        key, here = kinds[0], (*path, kinds[0])
        if key == "pretrained" and isinstance(data[key], dict) and "name" in data[key]:
            return self._imported(name, data[key], here, seeds, training)
        section: Any = self.validate(SECTIONS[key], data[key], here)
        if section is None:
            return None
        own = self._training(data[key].get("training"), training, (*here, "training"))
        common: dict[str, Any] = {"name": name, "kind": KINDS[key], "training": own, "seeds": seeds}
        if key == "pretrained":
            return System(**common, location=self._location(section.bundle, (*here, "bundle")))
        common |= self._objective(section, data[key], here)
        if key == "compress":
            steps = [self.named("compressors", s, (*here, "steps", i)) for i, s in enumerate(section.steps)]
            free = self._free(section, here) if section.budget and all(steps) else ()
            common |= {"steps": tuple(s for s in steps if s is not None), "budget": section.budget}
            return System(**common, parent=section.parent, free_steps=free)
        if section.seeds:
            common["seeds"] = self._distinct(section, (*here, "seeds"))
        return System(
            **common,
            model=self._model(section.model, (*here, "model")),
            init_from=section.init_from.system if section.init_from else None,
            init_layers=section.init_from.layers if section.init_from else {},
        )

    def _objective(self, section: Any, written: dict[str, Any], here: KeyPath) -> dict[str, Any]:
        """What a system trains with: fields of :class:`System`."""
        targets = self._targets_of(written.get("targets"), (*here, "targets"))
        losses = section.losses or ()
        terms = [self._term(t, (*here, "losses", i), targets.top_k) for i, t in enumerate(losses)]
        unlabelled, teachers = getattr(section, "unlabelled", None), getattr(section, "teachers", ())
        labels, keep = None, None
        if isinstance(unlabelled, UnlabelledSection):
            labels = unlabelled.labels
            keep = (unlabelled.keep or Keep()) if labels else None
            unlabelled = unlabelled.subset
        return {
            "targets": targets,
            "data": section.data,
            "unlabelled": unlabelled,
            "labels": labels,
            "keep": keep,
            "teachers": tuple(t for t in teachers if t != EMA),
            "ema": (section.ema or Ema()) if EMA in teachers else None,
            "terms": tuple(t for t in terms if t is not None),
        }

    def _free(self, section: CompressSection, here: KeyPath) -> tuple[int, ...]:
        """Numbers of the steps whose strength is not written, so that the budget decides it."""
        strengths = {i: self._strength(step["name"]) for i, step in enumerate(section.steps)}
        free = tuple(i for i, name in strengths.items() if name and name not in section.steps[i])
        if not free:
            able = [n for n in self.registry.names("compressors") if self._strength(n)]
            options = ", ".join(f"{name} ({self._strength(name)})" for name in able)
            remedy = f"leave the option of one step to the budget: {options}"
            self.problem((*here, "budget"), "no step is free to meet the budget", remedy)
        return free

    def _strength(self, compressor: str) -> str | None:
        """The option of a compressor that says how much smaller it makes a model."""
        option: str | None = getattr(self.registry.get("compressors", compressor), "strength", None)
        return option

    def _imported(
        self, name: str, data: dict[str, Any], path: KeyPath, seeds: tuple[int, ...], training: Training
    ) -> System | None:
        """``pretrained`` through a plugin. It is one model, whatever the seeds of its students."""
        named = self.named("teachers", data, path, beside=("text",))
        text = self.validate(TextForm, data.get("text"), (*path, "text"))
        if named is None or text is None:
            return None
        return System(
            name=name,
            kind="pretrained",
            seeds=seeds[:1],
            training=training,
            location=self._location("", path),
            plugin=named,
            text=text,
        )

    def _model(self, data: dict[str, Any], path: KeyPath) -> dict[str, Any] | None:
        named = self.named("architectures", data, path, beside=("heads",))
        heads = data.get("heads")
        if not isinstance(heads, dict) or not heads:
            self.problem(path, "heads is missing", "write heads: {ctc: {}}")
            return None
        built = {
            n: self.plugin("heads", n, options, (*path, "heads", n), (*path, "heads", n))
            for n, options in heads.items()
        }
        if named is None or not all(built.values()):
            return None
        return {"name": named.name, **named.options, "heads": {n: h.options for n, h in built.items() if h}}

    def _term(self, data: dict[str, Any], path: KeyPath, top_k: int | None) -> Term | None:
        core = tuple(TermSection.model_fields)
        named = self.named("losses", data, path, beside=core)
        if named is not None and named.options.get("top_k", 0) is None and "top_k" not in data:
            named.options["top_k"] = top_k
        section = self.validate(TermSection, {k: v for k, v in data.items() if k in core}, path)
        if named is None or section is None:
            return None
        start_below = section.start_below
        if "start_below" not in data:
            start_below = getattr(self.registry.get("losses", named.name), "start_below", None)
        return Term(named.name, named.options, section.weight, section.teacher, start_below)

    def _training(self, data: Any, base: Training, path: KeyPath) -> Training:
        """The recipe's settings with ``data`` over them, nested ones too."""
        if not data or self.validate(Training, data, path) is None:
            return base
        return Training.model_validate(_over(base.model_dump(), data))

    def _targets_of(self, data: Any, path: KeyPath) -> TargetOptions:
        """The recipe's ``targets`` with a system's own over them."""
        whole = {**self._targets.model_dump(), **data} if isinstance(data, dict) else {}
        return (self.validate(TargetOptions, whole, path) if whole else None) or self._targets

    def _inherit(self, systems: dict[str, System], seeds: tuple[int, ...]) -> dict[str, System]:
        """Seeds of teachers (one is enough), seeds and settings of compressed systems (the parent's)."""
        # What teaches only that which it is compressed to teaches it with the same seed.
        teaching = {
            teacher
            for name, system in systems.items()
            for teacher in system.teachers
            if teacher not in {parent.name for parent in lineage(systems, name)}
        }
        result: dict[str, System] = {}
        for name in depth_first(systems)[0]:
            system = systems[name]
            key = SECTION_OF[system.kind]
            data = self.document.data["systems"][name][key]
            alone = system.kind == "trained" and name in teaching and not data.get("seeds")
            if alone or system.kind == "pretrained":
                system = replace(system, seeds=seeds[:1])
            elif system.parent in result:
                parent = result[system.parent]
                path = ("systems", name, key, "training")
                training = self._training(data.get("training"), parent.training, path)
                system = replace(system, seeds=parent.seeds, training=training)
                system = self._with_objective(system, data, objective_of(result, parent.name))
            result[name] = system
        return {name: result[name] for name in systems}

    def _with_objective(self, system: System, written: dict[str, Any], base: System | None) -> System:
        """A compressed system that names a part of what it trains with has the rest from ``base``.

        One that names nothing has nothing of its own: see :func:`kdrecipe.recipe.suitable.objective_of`.
        """
        named = [key for key in OBJECTIVE if key in written]
        if not named:
            return system
        path: KeyPath = ("systems", system.name, "compress")
        if base is None:
            if "losses" not in named:
                what = "its parent's bundle holds no losses to train by"
                self.problem((*path, named[0]), what, "name losses, too")
            return system
        if "targets" in named:
            over = {**base.targets.model_dump(), **(written["targets"] or {})}
            targets = self.validate(TargetOptions, over, (*path, "targets")) or base.targets
            system = replace(system, targets=targets)
        fields = {"losses": ("terms",), "unlabelled": ("unlabelled", "labels", "keep")}
        fields |= {"teachers": ("teachers", "ema"), "ema": ()}
        absent = [field for key in OBJECTIVE if key not in named for field in fields.get(key, (key,))]
        return replace(system, **{field: getattr(base, field) for field in absent})

    def _place(self, written: Any, path: KeyPath) -> Location | None:
        """A path that may be left out; empty text counts as that."""
        return self._location(written, path) if written else None

    def _location(self, text: str, path: KeyPath) -> Location:
        return Location(text, self.document.where(path), Path(self.document.path).resolve().parent)

    def _check_name(self, name: str, path: KeyPath) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            self.problem(path, "a name has letters, digits, '_' and '-' only: it becomes a directory's")


class _SeedList(Options):
    seeds: Seeds


def _over(base: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in data.items():
        old = result.get(key)
        result[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
