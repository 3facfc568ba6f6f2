"""The profile ``tiny``, which every recipe has: the recipe shrunk by rule, to see whether all of it works.

A few utterances, one seed, two epochs, characters as tokens, narrow searches, and a parity gate that
untrained models pass. A system that starts from an imported model has the width of that, and one of its
layers. A plugin says itself how it shrinks, in an attribute ``tiny_options``:
option -> value, where a number is an upper bound and anything else replaces what the recipe says. The
recipe's own ``profiles: {tiny: ...}`` is merged over the result, for what the rule does not do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.parsing import KINDS
from kdrecipe.recipe.sections import Corpus, Lm, Parity, Training
from kdrecipe.recipe.yaml import Document, KeyPath
from kdrecipe.score.keep import Keep

NAME = "tiny"
WHERE = f"--profile {NAME}"

_TRAINING = {"epochs": 2, "batch_duration_s": 5.0, "accumulate": 1}
_SECTIONS: Mapping[str, tuple[type[BaseModel] | None, Mapping[str, Any]]] = {
    "corpus": (Corpus, {"max_utterances": 48}),
    "features": (None, {"speed_perturb": [1.0]}),
    "lm": (Lm, {"order": 3, "word_order": 2}),
    "training": (Training, _TRAINING),
    "decode": (None, {"measure_max": 5, "robustness": 3}),
    "parity": (Parity, {"num_utterances": 5}),
}
# Next to untrained, a rounding error decides between words.
_LOOSE_PARITY = {
    "max_token_error": 1,
    "max_token_error_runtime": 1,
    "max_rewritten": 1,
    "max_wer_increase": 100,
    "max_deletion_increase": 100,
}
# The labels of a random teacher, as in tests, would all be dropped.
_KEEP_ALL = [name for name in Keep.model_fields if name != "digits"]
_SUBSETS: Mapping[str, Mapping[str, int]] = {
    "speakers": {"speakers": 2},
    "utterances": {"utterances": 8},
    "hours": {"speakers": 2},
    "listed_in": {"speakers": 2},
}
"""Rule of a subset -> the rule in its place."""


def shrink(document: Document, registry: Registry, systems: Iterable[str] | None = None) -> Document:
    """A copy of a recipe's document, shrunk; what is wrong in it is left for the checks to tell.

    ``systems``: only these of it; None: all of the recipe.
    """
    tiny = _Shrinking(document.copy(), registry)
    if systems is None:
        tiny.recipe()
    else:
        tiny.systems(systems)
    return tiny.document


class _Shrinking:
    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry

    def recipe(self) -> None:
        """All of it."""
        for key, (model, limits) in _SECTIONS.items():
            if key != "lm" or self.at((key,)) is not None:
                self.limit((key,), limits, model)
        for key, value in _LOOSE_PARITY.items():
            self.put(("parity", key), value)
        bundles = any(self.at(("systems", n, "pretrained", "bundle")) for n in self.keys(("systems",)))
        if not bundles and self.at(("tokens", "name")) != "from_teacher":  # these have their tokens already
            self.put(("tokens", "name"), "char")
            self.put(("tokens", "vocab_size"), None)
        self.first_seed(("seeds",))
        self.plugin("corpora", ("corpus",))
        for name in self.keys(("corpus", "subsets")):
            self.subset(("corpus", "subsets", name))
        self.systems(self.keys(("systems",)))
        for label in self.keys(("decode", "decoders")):
            self.plugin("decoders", ("decode", "decoders", label))

    def systems(self, names: Iterable[str]) -> None:
        """Those of these names."""
        for name in names:
            for kind in KINDS:
                self.system(("systems", name, kind))

    def system(self, path: KeyPath) -> None:
        """What stands under ``train:``, ``distill:`` or ``compress:``."""
        own = self.keys((*path, "training"))
        self.limit((*path, "training"), {k: v for k, v in _TRAINING.items() if k in own}, None)
        self.first_seed((*path, "seeds"))
        if self.at((*path, "unlabelled", "labels")) is not None:
            self.put((*path, "unlabelled", "keep"), dict.fromkeys(_KEEP_ALL) | {"digits": False})
        kept = self.first_layers(path) if self.starts_imported(path) else []
        if "encoder" not in kept:
            self.plugin("architectures", (*path, "model"))
        for head in self.keys((*path, "model", "heads")):
            if head not in kept:
                self.plugin("heads", (*path, "model", "heads", head), head)
        for kind, key in (("losses", "losses"), ("compressors", "steps")):
            items = self.at((*path, key))
            for i in range(len(items)) if isinstance(items, list) else ():
                self.plugin(kind, (*path, key, i))

    def starts_imported(self, path: KeyPath) -> bool:
        """Whether a system starts from a model that is imported, and so has the widths of that."""
        start = self.at((*path, "init_from"))
        other = start.get("system") if isinstance(start, dict) else start
        return isinstance(other, str) and self.at(("systems", other, "pretrained")) is not None

    def first_layers(self, path: KeyPath) -> list[str]:
        """The parts that a system takes over, with their first layer alone; without a word, the encoder."""
        start = (*path, "init_from")
        if isinstance(other := self.at(start), str):
            self.put(start, {"system": other})
        parts = self.keys((*start, "layers")) or ["encoder"]
        for part in parts:
            self.put((*start, "layers", part), [0])
            owner = ("model",) if part == "encoder" else ("model", "heads", part)
            self.put((*path, *owner, "num_layers"), 1)
        return parts

    def subset(self, path: KeyPath) -> None:
        """A few speakers or utterances; shares and rests stay as they are."""
        rule = self.at(path)
        if isinstance(rule, dict) and len(rule) == 1 and (key := next(iter(rule))) in _SUBSETS:
            small = dict(_SUBSETS[key])
            if key in small and isinstance(rule[key], int):
                small[key] = min(small[key], rule[key])
            self.put(path, small)

    def plugin(self, kind: str, path: KeyPath, name: Any = None) -> None:
        """A plugin's options; ``name``: where it does not stand beside them."""
        options = self.at(path)
        name = options.get("name") if name is None and isinstance(options, dict) else name
        if isinstance(name, str) and self.registry.problem(kind, name) is None:
            cls = self.registry.get(kind, name)
            self.limit(path, getattr(cls, "tiny_options", {}), cls.Config)

    def limit(self, path: KeyPath, limits: Mapping[str, Any], model: type[BaseModel] | None) -> None:
        """Options at ``path``: a number is an upper bound, anything else is put in place.

        ``model`` knows the defaults of options that are not written.
        """
        written = self.at(path)
        if written is not None and not isinstance(written, dict):
            return
        for key, limit in limits.items():
            default = model.model_fields[key].get_default(call_default_factory=True) if model else None
            value = (written or {}).get(key, default)
            if not (_is_number(value) and _is_number(limit) and value <= limit):
                self.put((*path, key), limit)

    def first_seed(self, path: KeyPath) -> None:
        """The first of several seeds."""
        seeds = self.at(path)
        if isinstance(seeds, list):
            self.put(path, seeds[:1])

    def at(self, path: KeyPath) -> Any:
        """What stands there; None if nothing does."""
        return self.document.at(path)

    def keys(self, path: KeyPath) -> list[str]:
        """Keys of the mapping there."""
        node = self.at(path)
        return list(node) if isinstance(node, dict) else []

    def put(self, path: KeyPath, value: Any) -> None:
        """Set a value, unless what is above it is no mapping, which is a mistake that the checks tell."""
        above = self.at(path[:-1]) if len(path) > 1 else {}
        if above is None or isinstance(above, dict):
            self.document.set(path, value, WHERE)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
