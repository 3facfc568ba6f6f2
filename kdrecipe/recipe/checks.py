"""What can be wrong between the parts of a recipe that are right by themselves.

Found before any work: names that do not exist, circles, losses without a teacher. Whether models, losses and
teachers fit each other: :mod:`kdrecipe.recipe.fit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrecipe.errors import KdrecipeError, PluginError, did_you_mean
from kdrecipe.interfaces import TEXT_KINDS, TargetSpec
from kdrecipe.plugin.loader import reason
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.parsing import SECTION_OF, Parser
from kdrecipe.recipe.sections import (
    ALL,
    EMA,
    NONE,
    Corpus,
    Decode,
    Named,
    Parity,
    System,
    Term,
    depth_first,
)
from kdrecipe.recipe.starting import misfits
from kdrecipe.recipe.suitable import (
    bundle_model,
    head_of,
    heads_of,
    measured_exporter,
    objective_of,
    origin_of,
    searches,
)
from kdrecipe.recipe.terms import labels_of
from kdrecipe.recipe.yaml import KeyPath

TRAIN = "train"  # the split that tokens and models are learnt from


class Checker:
    """Looks at all systems together; problems go to the parser's list."""

    def __init__(
        self,
        parser: Parser,
        systems: Mapping[str, System],
        corpus: Corpus | None,
        decode: Decode,
        exports: tuple[Named, ...],
    ) -> None:
        self.parser = parser
        self.systems = systems
        self.corpus = corpus
        self.decode = decode
        self.exports = exports
        written = parser.document.data.get("systems")
        # Also those that could not be read: one mistake must not be reported twice.
        self.names = {n for n, v in written.items() if v is not None} if isinstance(written, dict) else set()

    def check(self) -> None:
        """All checks but those that build models."""
        self._subsets()
        for system in self.systems.values():
            self._names(system)
            self._seeds(system)
            if system.learns:
                self._data(system)
                self._terms(system)
                self._aligned(system)
                self._joined(system)
                self._view(system)
            if system.kind == "compressed":
                self._fine_tuning(system)
        for circle in depth_first(self.systems)[1]:
            self._problem(
                self.systems[circle[0]], (), f"needs itself: {' -> '.join(circle)}", "break the circle"
            )
        for i, pair in enumerate(self.decode.compare):
            for name in pair:
                self._known(name, ("decode", "compare", i))
        self._splits()
        self._heads()

    # ------------------------------------------------------------ names

    def _splits(self) -> None:
        """What is trained on and decoded is among the splits of the corpus, where it can name them."""
        corpus = self.corpus
        if corpus is None or not corpus.name:
            return
        cls = self._registry.get("corpora", corpus.name)
        try:
            splits = getattr(cls(cls.Config.model_validate(corpus.options)), "split_names", None)
        except KdrecipeError as error:
            self.parser.problems += error.problems
            return
        except Exception as error:
            self.parser.problem(("corpus",), f"{corpus.name!r} can't be built: {reason(error)}")
            return
        if splits is None:
            return
        if TRAIN not in splits:
            self.parser.problem(("corpus",), f"has no split {TRAIN!r}", f"its splits: {', '.join(splits)}")
        for i, split in enumerate(self.decode.splits):
            if split not in splits:
                remedy = did_you_mean(split, splits)
                self.parser.problem(("decode", "splits", i), f"the corpus has no split {split!r}", remedy)

    def _subsets(self) -> None:
        subsets = self.corpus.subsets if self.corpus else {}
        for name, rule in subsets.items():
            seen = [name]
            while "except" in rule:
                path: KeyPath = ("corpus", "subsets", name)
                other = rule["except"]
                if other not in subsets:
                    remedy = did_you_mean(other, set(subsets) - {name})
                    self.parser.problem(path, f"unknown subset {other!r}", remedy)
                    break
                seen.append(other)
                if other in seen[:-1]:
                    self.parser.problem(path, f"needs itself: {' -> '.join(seen)}")
                    break
                rule = subsets[other]

    def _names(self, system: System) -> None:
        for i, teacher in enumerate(system.teachers):
            if teacher in system.teachers[:i]:
                self._problem(system, ("teachers", i), f"{teacher!r} is listed twice")
            elif self._known(teacher, self._path(system, "teachers", i)):
                self._buildable_before(system, teacher, ("teachers", i), "teach")
        if system.parent is not None and self._known(system.parent, self._path(system, "from")):
            parent = self.systems.get(system.parent)
            if parent is not None and parent.is_imported:
                what = (
                    f"{system.parent!r} is imported by a plugin: it teaches, there is no bundle to compress"
                )
                self._problem(system, ("from",), what, "distil a student from it and compress that")
        if system.init_from is not None and self._known(system.init_from, self._path(system, "init_from")):
            self._buildable_before(system, system.init_from, ("init_from",), "lend its weights")
            self._start(system, system.init_from)

    def _start(self, system: System, other: str) -> None:
        """Whether the weights of ``other`` fit."""
        parent = self.systems.get(other)
        model = parent.model if parent is not None else None  # a bundle's is seen in its stage
        if parent is not None and parent.kind == "pretrained":
            model = bundle_model(parent)
        if model is None or system.model is None:
            return
        for misfit in misfits(self._registry, system.model, model, system.init_layers):
            self._problem(system, ("init_from",), f"{other!r} {misfit.what}", misfit.remedy)

    def _buildable_before(self, system: System, other: str, path: KeyPath, verb: str) -> None:
        if self._is_compressed(other) and (system.kind != "compressed" or verb != "teach"):
            remedy = "name the system that it is compressed from"
            what = f"{other!r} is compressed, in stage 6, and comes too late to {verb}"
            self._problem(system, path, what, remedy)

    def _is_compressed(self, name: str) -> bool:
        return name in self.systems and self.systems[name].kind == "compressed"

    def _known(self, name: str, path: KeyPath) -> bool:
        if name in self.names:
            return True
        self.parser.problem(path, f"unknown system {name!r}", did_you_mean(name, self.names))
        return False

    def _seeds(self, system: System) -> None:
        for other in system.needs:
            if other not in self.systems or len(self.systems[other].seeds) == 1:
                continue
            absent = [s for s in system.seeds if s not in self.systems[other].seeds]
            if absent:
                has = list(self.systems[other].seeds)
                what = f"has seeds {list(system.seeds)}, but {other!r}, which it needs, has only {has}"
                self._problem(system, (), what, f"give {other!r} the same seeds, or a single one")

    def _data(self, system: System) -> None:
        subsets = self.corpus.subsets if self.corpus else None
        for key, special in (("data", NONE), ("unlabelled", ALL)):
            name = getattr(system, key)
            if name not in (None, special) and subsets is not None and name not in subsets:
                remedy = did_you_mean(name, {*subsets, special}) + " (corpus.subsets)"
                self._problem(system, (key,), f"unknown subset {name!r}", remedy)
        self._labels(system)
        if system.unlabelled is not None and system.data in (None, system.unlabelled):
            whole = "all of the training split" if system.data is None else f"{system.data!r}"
            what = f"{whole} is labelled data already, nothing is left without labels"
            self._problem(system, ("unlabelled",), what, "give data: and unlabelled: different subsets")

    def _labels(self, system: System) -> None:
        """Where labels come from if not from people."""
        path: KeyPath = ("unlabelled", "labels")
        if system.labels == EMA:
            what = f"labels are made before training, when there is no {EMA} yet"
            self._problem(system, path, what, "name a teacher that is a system")
        elif system.labels is not None and self._known(system.labels, self._path(system, *path)):
            if system.labels not in system.teachers:
                what = f"{system.labels!r} is not among its teachers"
                self._problem(system, path, what, f"teachers: [{system.labels}]")
            elif self._is_compressed(system.labels):
                self._buildable_before(system, system.labels, path, "write labels")
            elif not any(self._supervised(term) for term in system.terms):
                what = "no loss learns from labels, so the hypotheses are of no use"
                self._problem(system, path, what, "add a supervised loss such as ctc, or remove labels")
        if system.data == NONE and system.unlabelled is None:
            remedy = f"add unlabelled: {{subset: {ALL}, labels: <a teacher>}}"
            self._problem(system, ("data",), "nothing is left to learn from", remedy)
        elif system.data == NONE and system.labels is None:
            idle = [term.name for term in system.terms if self._supervised(term)]
            if idle:
                remedy = f"unlabelled: {{subset: {system.unlabelled}, labels: <a teacher>}}, or remove them"
                self._problem(system, ("losses",), f"{', '.join(idle)} would have no labels", remedy)

    def _fine_tuning(self, system: System) -> None:
        """A step that trains needs losses: of its own, or of a system which all this was compressed from."""
        origin = origin_of(self.systems, system.name)
        if origin is None or objective_of(self.systems, system.name) is not None or self._losses(system):
            return
        for i, step in enumerate(system.steps):
            cls = self._registry.get("compressors", step.name)
            try:
                num_epochs = cls(cls.Config.model_validate(step.options)).num_epochs
            except Exception as error:
                self._problem(system, ("steps", i), f"{step.name!r} can't be built: {reason(error)}")
                continue
            if num_epochs:
                what = f"{step.name!r} trains for {num_epochs} epochs, but {origin.name!r} is pretrained: "
                what += "its bundle holds no losses to train by"
                remedy = "add losses: [...] here, choose options without training (epochs: 0), or compress a "
                remedy += "system that this recipe trains or distills"
                self._problem(system, ("steps", i), what, remedy)

    def _losses(self, system: System) -> list[Any]:
        """The losses that are written for a system, read or not; of one that may lack them, those it has."""
        written = self.parser.document.data["systems"][system.name][SECTION_OF[system.kind]]
        found: list[Any] = written.get("losses") or []
        return found

    # ------------------------------------------------------------ losses

    def _terms(self, system: System) -> None:
        if len(system.terms) < max(1, len(self._losses(system))):
            return  # a term could not be read: already reported
        if all(term.weight == 0 for term in system.terms):
            self._problem(system, ("losses",), "all weights are 0: there is nothing to learn")
        self._labels_differ(system)
        self._warm_start(system)
        self._codebooks(system)
        taught: set[str] = {system.labels} if system.labels else set()
        for i, term in enumerate(system.terms):
            path = ("losses", i, "teacher")
            if not self.requires(term):
                if term.teacher is not None:
                    self._problem(system, path, f"{term.name!r} learns nothing from a teacher", "remove it")
            elif not system.all_teachers:
                remedy = "make it distill: with teachers: [...], or use another loss"
                self._problem(system, ("losses", i), f"{term.name!r} needs a teacher", remedy)
            elif term.teacher is not None and term.teacher not in system.all_teachers:
                remedy = did_you_mean(term.teacher, system.all_teachers)
                self._problem(system, path, f"{term.teacher!r} is not among its teachers", remedy)
            elif term.teacher is not None and self.takes_all(term):
                what = f"{term.name!r} learns from all teachers of its system at once"
                self._problem(system, path, what, "remove teacher:")
            else:
                taught |= {term.teacher} if term.teacher else set(system.all_teachers)
        if system.all_teachers and not system.labels and not any(self.requires(t) for t in system.terms):
            losses = [n for n in self._registry.names("losses") if self._can_distill(n)]
            remedy = f"add one of {', '.join(losses)}, or make it train:"
            self._problem(system, ("losses",), "no loss learns from a teacher", remedy)
        elif taught and (idle := [t for t in system.all_teachers if t not in taught]):
            self._problem(system, ("teachers",), f"no loss learns from {', '.join(idle)}")
        if system.unlabelled and not system.labels and all(self._supervised(t) for t in system.terms):
            remedy = "add a loss that needs no labels, or remove unlabelled:"
            self._problem(system, ("unlabelled",), "all losses need labels", remedy)

    def _aligned(self, system: System) -> None:
        """A teacher's target comes to the student's frames in one way, whichever losses learn from it."""
        ways: dict[tuple[str, str], tuple[str, str]] = {}
        for i, term in enumerate(system.terms):
            for need in self.requires(term):
                for teacher in (term.teacher,) if term.teacher else system.teachers:
                    if need.align is None:
                        continue
                    other, way = ways.setdefault((teacher, need.key), (term.name, need.align))
                    if way != need.align:
                        what = (
                            f"align: {need.align} for {need.key} of {teacher!r}, which {other!r} has by {way}"
                        )
                        self._problem(system, ("losses", i, "align"), what, "give both losses the same align")

    def _labels_differ(self, system: System) -> None:
        """Two terms that no log could tell apart."""
        labels = labels_of(system.terms, [self.requires(term) for term in system.terms])
        for i, label in enumerate(labels):
            if label in labels[:i]:
                what = f"a second term {label!r}"
                remedy = "let them learn from other heads, layers or teachers, or make one of both"
                self._problem(system, ("losses", i), what, remedy)

    def _codebooks(self, system: System) -> None:
        """Codebooks are trained in stage 4, of teachers that are there by then."""
        for i, term in enumerate(system.terms):
            if not any(need.kind == "codebooks" for need in self.requires(term)):
                continue
            for name in [term.teacher] if term.teacher else system.all_teachers:
                late = name in self.systems and self.systems[name].all_teachers
                if name == EMA or late or self._is_compressed(name):
                    what = f"{term.name!r} needs codebooks, which stage 4 trains, and {name!r} comes after it"
                    remedy = "name a teacher that has no teacher itself (term: teacher: ...)"
                    self._problem(system, ("losses", i), what, remedy)

    def _warm_start(self, system: System) -> None:
        """The average of an untrained model teaches noise."""
        if system.ema is None or system.init_from is not None or system.kind == "compressed":
            return
        early = [
            term
            for term in system.terms
            if term.teacher in (None, EMA) and term.start_below is None and self.requires(term)
        ]
        if early:
            what = f"{early[0].name!r} would learn noise from {EMA}, the average of an untrained student"
            remedy = "init_from: <a trained system>, or start_below: 0.5 on its losses"
            self._problem(system, ("teachers",), what, remedy)

    def _joined(self, system: System) -> None:
        """Utterances can't be joined beside cached targets that follow the text of one of them."""
        augment = system.training.augment
        if augment is None or augment.join == 0 or system.targets.mode != "cached":
            return
        # targets of teachers that are distilled or compressed themselves are never cached
        cached = {
            n
            for n in system.teachers
            if n in self.systems and not self.systems[n].teachers and not self._is_compressed(n)
        }
        for i, term in enumerate(system.terms):
            if not cached & ({term.teacher} if term.teacher else set(system.teachers)):
                continue
            for kind in dict.fromkeys(need.kind for need in self.requires(term) if need.kind in TEXT_KINDS):
                what = f"{term.name!r} learns from cached {kind}, which follow the text of one utterance"
                remedy = "training.augment.join joins utterances: set it to 0 here, or targets.mode: live"
                self._problem(system, ("losses", i), what, remedy)

    def _view(self, system: System) -> None:
        """Masks are on features: who hears audio can't hear them."""
        if system.targets.view != "masked":
            return
        path = ("targets", "view")
        for name in system.teachers:
            plugin = self.systems[name].plugin if name in self.systems else None
            if plugin is not None and self._registry.get("teachers", plugin.name).input == "audio":
                what = f"{name!r} hears audio, and masks are on features"
                self._problem(system, path, what, "view: clean, or a teacher that hears features")
        if system.training.spec_augment is None:
            what = "the student's input is not masked (training.spec_augment: null)"
            self._problem(system, path, what, "view: clean, or set spec_augment")

    def requires(self, term: Term) -> list[TargetSpec]:
        """What a term asks of a teacher."""
        cls = self._registry.get("losses", term.name)
        config = cls.Config.model_validate(term.options)
        try:
            return list(cls.requires(config)) if hasattr(cls, "requires") else []
        except KdrecipeError:
            raise
        except Exception as error:
            raise PluginError(f"loss {term.name!r}: its requires() fails: {reason(error)}") from error

    def takes_all(self, term: Term) -> bool:
        """Whether a term gets the targets of all teachers at once."""
        return bool(getattr(self._registry.get("losses", term.name), "all_teachers", False))

    def _can_distill(self, name: str) -> bool:
        try:
            return bool(self.requires(Term(name)))
        except Exception:  # options without defaults: it can't be asked
            return True

    def _supervised(self, term: Term) -> bool:
        return bool(getattr(self._registry.get("losses", term.name), "supervised", False))

    # ------------------------------------------------------------ heads

    def _heads(self) -> None:
        """Every system's first head is searched and measured; every decoder has a system."""
        heads = {name: heads_of(self.systems, name) for name in self.systems}
        by_first: dict[str, list[str]] = {}
        for name, found in heads.items():
            if found:
                by_first.setdefault(found[0], []).append(name)
        written = self._written("decode", "decoders", {})
        given = [label for label, data in written.items() if data is not None]
        if set(given) <= set(self.decode.decoders):  # else one could not be read: already reported
            for head, names in by_first.items():
                if not searches([head], self.decode.decoders, self._registry):
                    self._unsearched(head, names)
            for name, found in heads.items():
                self._beside(name, found or ())
            if self.names <= set(heads) and None not in heads.values():
                used = {head for found in heads.values() for head in found or ()}
                for label in given:
                    self._unused(label, used)
        if len(self._written("export", None, [])) <= len(self.exports):
            for head, names in by_first.items():
                if measured_exporter([head], self.exports, self._registry) is None:
                    self._unmeasured(head, names)

    def _written(self, section: str, key: str | None, kind: Any) -> Any:
        """What the document says there, if it is of that kind; else ``kind``, which is empty."""
        data = self.parser.document.data.get(section)
        if key is not None:
            data = data.get(key) if isinstance(data, dict) else None
        return data if isinstance(data, type(kind)) else kind

    def _unsearched(self, head: str, names: list[str]) -> None:
        fitting = [
            n for n in self._registry.names("decoders") if head_of(self._registry, "decoders", n) == head
        ]
        what = f"no decoder in decode.decoders searches the head {head!r} of {_systems(names)}"
        remedy = f"add one of {', '.join(fitting)}" if fitting else "install a plugin with one"
        self.parser.problem(("decode", "decoders"), what, remedy)

    def _beside(self, system: str, heads: Sequence[str]) -> None:
        """A decoder of one of the system's heads may need another one beside it."""
        for label, decoder in searches(heads, self.decode.decoders, self._registry).items() if heads else ():
            cls = self._registry.get("decoders", decoder.name)
            needs = cls.beside(cls.Config.model_validate(decoder.options)) if hasattr(cls, "beside") else ()
            for head in (h for h in needs if h not in heads):
                what = f"{decoder.name!r} with these options also reads the head {head!r}, which "
                what += f"{system!r} lacks"
                remedy = f"add {head}: {{}} to the model's heads, or change the decoder's options"
                self.parser.problem(("decode", "decoders", label), what, remedy)

    def _unused(self, label: str, used: set[str]) -> None:
        name = self.decode.decoders[label].name
        head = head_of(self._registry, "decoders", name)
        if head not in used:
            what = f"{name!r} searches the head {head!r}, which no system has"
            self.parser.problem(("decode", "decoders", label), what, "remove it, or add the head to a model")

    def _unmeasured(self, head: str, names: list[str]) -> None:
        what = (
            "size, speed and memory are measured on an export, and none of those listed is of "
            f"the head {head!r} of {_systems(names)}"
        )
        registry = self._registry
        known = [Named(name) for name in registry.names("exporters")]
        fitting = [e.name for e in known if measured_exporter([head], [e], registry) is not None]
        remedy = " or ".join(f"add {{name: {name}}}" for name in fitting) or "install a plugin with one"
        self.parser.problem(("export",), what, remedy)

    @property
    def _registry(self) -> Registry:
        return self.parser.registry

    def _path(self, system: System, *rest: str | int) -> KeyPath:
        return ("systems", system.name, SECTION_OF[system.kind], *rest)

    def _problem(self, system: System, rest: KeyPath, what: str, remedy: str = "") -> None:
        self.parser.problem(self._path(system, *rest), what, remedy)


def check_parity_bounds(parser: Parser, parity: Parity, exports: Sequence[Named]) -> None:
    """Bounds by variant are of variants that some exporter knows."""
    classes = [parser.registry.get("exporters", e.name) for e in exports]
    variants = {variant for cls in classes for variant in getattr(cls, "files", ())}
    for key, bound in parity:
        for name in bound if isinstance(bound, dict) and variants else ():
            if name not in variants:
                what = f"no exporter in export has a variant {name!r}"
                parser.problem(("parity", key, name), what, did_you_mean(name, sorted(variants)))


def _systems(names: list[str]) -> str:
    """``system 'a'``, ``systems 'a', 'b'``, at most three of them by name."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"system{'s' if len(names) > 1 else ''} {', '.join(map(repr, names[:3]))}{more}"
