"""A recipe: ``recipe.yaml``, checked as a whole before any work."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdrecipe.artifacts import sha256_file
from kdrecipe.errors import KdrecipeError, PluginError, Problem, RecipeError, did_you_mean
from kdrecipe.plugin.carried import CONSENT, read_description, refusal, verified
from kdrecipe.plugin.loader import Plugins, load_plugins
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe import tiny
from kdrecipe.recipe.bundles import check_features
from kdrecipe.recipe.checks import Checker, check_parity_bounds
from kdrecipe.recipe.fit import FitChecker
from kdrecipe.recipe.learnt import check_lm, check_own_tokens, with_text
from kdrecipe.recipe.parsing import TOP_KEYS, Parser
from kdrecipe.recipe.sections import (
    Claim,
    Corpus,
    Decode,
    Features,
    Lm,
    Location,
    Named,
    Parity,
    SpecAugment,
    System,
    TargetOptions,
    Term,
    Tokens,
    Training,
    depth_first,
)
from kdrecipe.recipe.suitable import heads_of, model_of, objective_of, searches
from kdrecipe.recipe.trials import OPTION, Trial, without_effect, written_out
from kdrecipe.recipe.yaml import Document, KeyPath, load_yaml, parse_value

__all__ = [
    "Claim",
    "Corpus",
    "Decode",
    "Features",
    "Lm",
    "Named",
    "Parity",
    "Recipe",
    "SpecAugment",
    "System",
    "TargetOptions",
    "Term",
    "Tokens",
    "Training",
    "load_recipe",
]

CHOSEN_NAMES: tuple[KeyPath, ...] = (
    ("systems",),
    ("profiles",),
    ("corpus", "subsets"),
    ("decode", "decoders"),
)
"""Mappings whose keys are the user's own names."""


@dataclass(frozen=True)
class Recipe:
    """A recipe in which nothing is known to be wrong.

    Args:
        document: the YAML with profile and overrides applied; ``document.where(key_path)``.
        plugins: what is loaded for it.
        plugin_files: its own plugin files, and those of imported bundles that the user trusts.
        profiles: those that it writes itself; ``tiny`` is there without.
        profile: the profile that was merged in, if any.
        overrides: ``key=value`` texts that were applied.
        trust_plugins: whether the code of imported bundles may run.
        trials: other options of its systems, which ``--trials`` compares.
        with_trials: whether they are systems here.
    """

    document: Document
    plugins: Plugins
    corpus: Corpus
    features: Features
    tokens: Tokens
    seeds: tuple[int, ...]
    training: Training
    targets: TargetOptions
    systems: dict[str, System]
    decode: Decode
    export: tuple[Named, ...]
    parity: Parity
    claims: tuple[Claim, ...] = ()
    lm: Lm | None = None
    profiles: tuple[str, ...] = ()
    plugin_files: tuple[Path, ...] = ()
    profile: str | None = None
    overrides: tuple[str, ...] = field(default=())
    trust_plugins: bool = False
    trials: tuple[Trial, ...] = ()
    with_trials: bool = False

    @property
    def path(self) -> Path:
        """The ``recipe.yaml``."""
        return self.document.path

    @property
    def dir(self) -> Path:
        """Its directory."""
        return self.path.resolve().parent

    @property
    def name(self) -> str:
        """``corpus/name`` below a directory ``recipes``, else the directory's name."""
        parts = self.dir.parts
        if "recipes" in parts[:-1]:
            last = len(parts) - 1 - parts[::-1].index("recipes")
            return "/".join(parts[last + 1 :])
        return self.dir.name

    @property
    def as_it_stands(self) -> bool:
        """Whether neither a profile nor ``--set`` changed anything in it."""
        return self.profile is None and not self.overrides

    @property
    def command(self) -> str:
        """The command that makes its results, without any path of this machine."""
        words = ["kdrecipe", "run", self.name]
        words += ["--profile", self.profile] if self.profile else []
        for override in self.overrides:
            words += ["--set", override]
        words += ["--trust-plugins"] if self.trust_plugins else []
        words += [OPTION] if self.with_trials else []
        return shlex.join(words)

    def teaching(self) -> list[str]:
        """Systems of stage 3, in the order in which they can be built.

        Those that teach and have no teacher themselves, and what they start from. A compressed system that
        teaches another one is built in stage 6.
        """
        teachers = {t for s in self.systems.values() for t in s.teachers}
        wanted = {
            n for n in teachers if not self.systems[n].teachers and self.systems[n].kind != "compressed"
        }
        while more := {need for n in wanted for need in self.systems[n].needs} - wanted:
            wanted |= more
        return [name for name in depth_first(self.systems)[0] if name in wanted]

    def first_teachers(self) -> list[str]:
        """Systems of stage 3 that others learn from, without those that are only started from."""
        taught_by = {name for system in self.systems.values() for name in system.teachers}
        return [name for name in self.teaching() if name in taught_by]

    def build_order(self) -> list[str]:
        """All systems, each after what it needs: those of stage 3, of stage 5, of stage 6."""
        early = self.teaching()
        later = [name for name in depth_first(self.systems)[0] if name not in early]
        return early + sorted(later, key=lambda name: self.systems[name].kind == "compressed")

    def seed_of(self, system: str, seed: int) -> int:
        """The seed of ``system`` that serves a child with ``seed``: its only one, or the same."""
        seeds = self.systems[system].seeds
        return seeds[0] if len(seeds) == 1 else seed

    def objective_of(self, system: str) -> System | None:
        """The system whose losses, teachers and data a compressed one trains with; None: there are none."""
        return objective_of(self.systems, system)

    def model_of(self, system: str) -> dict[str, Any] | None:
        """The description of its model, or of its parent's; None: a bundle not there yet."""
        return model_of(self.systems, system)

    def heads_of(self, system: str) -> tuple[str, ...] | None:
        """Heads of its model, the first being the one it is judged by; None: a bundle not there yet.

        What a plugin imports has none that anything here searches or exports.
        """
        return heads_of(self.systems, system)

    def searches_of(self, system: str) -> dict[str, Named]:
        """Decoders that serve it, by label, its main search first; all where its heads are not known."""
        heads = self.heads_of(system)
        if heads is None:
            return dict(self.decode.decoders)
        return searches(heads, self.decode.decoders, self.plugins.registry)

    @property
    def writers(self) -> tuple[str, ...]:
        """Imported teachers whose hypotheses tokens or the language model are learnt from."""
        found = (self.tokens.labels, self.lm.labels if self.lm else None)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def caches(self, teacher: str, student: System) -> bool:
        """Whether targets for a student come from the cache; stage 4 sees only the teachers of stage 3."""
        return student.targets.mode == "cached" and teacher in self.teaching()


def load_recipe(
    path: Path | str,
    *,
    overrides: Sequence[str] = (),
    profile: str | None = None,
    plugins: Plugins | None = None,
    trust_plugins: bool = False,
    with_trials: bool = False,
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: ``recipe.yaml`` or its directory.
        overrides: ``key=value`` with a dotted key (list items by number) and a YAML value, applied
            after the profile.
        profile: one of the recipe's ``profiles``, merged in first; ``tiny``, which every recipe has,
            shrinks it before that.
        plugins: use these instead of loading what is installed and what the recipe names.
        trust_plugins: load the plugin files of imported bundles, too. Without it, a bundle with plugin
            files that the recipe does not name itself is refused.
        with_trials: make a system of each trial, see :mod:`kdrecipe.recipe.trials`.

    Raises:
        RecipeError: all that is wrong, each with file and line.
    """
    path = Path(path)
    written = load_yaml(path / "recipe.yaml" if path.is_dir() else path)
    document, problems = _apply(written.copy(), profile, overrides)
    tried, trials, wrong_trials = written_out(document)
    problems += wrong_trials
    document = tried if with_trials else document
    files, file_problems = _plugin_files(document)
    carried, carried_problems = _carried_files(document, files, trust_plugins)
    files += carried
    problems += file_problems + carried_problems
    if plugins is None:
        try:
            plugins = load_plugins(files)
        except PluginError as error:
            problems += error.problems
            plugins = load_plugins()
    if profile == tiny.NAME:
        document, _ = _apply(tiny.shrink(written, plugins.registry), profile, overrides)
        if with_trials:
            document, trials, _ = written_out(document)
            document = tiny.shrink(document, plugins.registry, [trial.name for trial in trials])
    parser = Parser(document, plugins.registry)
    parser.problems += problems
    parser.top_keys()
    seeds, training = parser.seeds(), parser.section(Training, "training")
    features, tokens = parser.section(Features, "features"), parser.section(Tokens, "tokens")
    targets, parity = parser.section(TargetOptions, "targets"), parser.section(Parity, "parity")
    corpus, decode, claims = parser.corpus(), parser.decode(), parser.claims()
    lm = parser.lm()
    systems = parser.systems(seeds, training, targets)
    exports = parser.exports(systems)
    checker = Checker(parser, systems, corpus, decode, exports)
    checker.check()
    check_parity_bounds(parser, parity, exports)
    check_lm(parser, lm, decode)
    check_own_tokens(parser, tokens, systems)
    tokens = with_text(parser, "tokens", tokens, systems, corpus)
    if lm is not None and lm.text is None:
        lm = with_text(parser, "lm", lm, systems, corpus)
    check_features(parser, systems, features)
    if not parser.problems:
        FitChecker(checker, features, tokens).check()
        if with_trials and profile != tiny.NAME:  # which makes trials alike
            parser.problems += without_effect(trials, systems)
    if parser.problems or corpus is None:
        raise RecipeError(_sorted(parser.problems))
    recipe = Recipe(
        document=document,
        plugins=plugins,
        corpus=corpus,
        features=features,
        tokens=tokens,
        seeds=seeds,
        training=training,
        targets=targets,
        systems=systems,
        decode=decode,
        export=exports,
        parity=parity,
        claims=claims,
        lm=lm,
        profiles=tuple(document.data.get("profiles") or {}),
        plugin_files=tuple(files),
        profile=profile,
        overrides=tuple(overrides),
        trust_plugins=trust_plugins,
        trials=trials,
        with_trials=with_trials,
    )
    _ask_plugins(recipe)
    return recipe


def _apply(
    document: Document, profile: str | None, overrides: Sequence[str]
) -> tuple[Document, list[Problem]]:
    """The document with profile and overrides in it."""
    problems: list[Problem] = []
    profiles = document.data.get("profiles") or {}
    if problem := _no_profiles(document):
        problems.append(problem)
    elif profile not in (None, tiny.NAME, *profiles):
        remedy = did_you_mean(str(profile), {*profiles, tiny.NAME})
        problems.append(Problem(f"unknown profile {profile!r}", f"--profile {profile}", remedy))
    elif profile in profiles:
        document = document.merged(("profiles", str(profile)))
    for override in overrides:
        try:
            _override(document, override)
        except RecipeError as error:
            problems += error.problems
    if not problems and (problem := _no_profiles(document)):  # an override of them
        problems.append(problem)
    return document, problems


def _no_profiles(document: Document) -> Problem | None:
    """What is wrong with ``profiles``, if they are not mappings."""
    profiles = document.data.get("profiles") or {}
    if isinstance(profiles, dict) and all(isinstance(profile, dict) for profile in profiles.values()):
        return None
    return Problem("profiles: must be a mapping of mappings: {tiny: {...}}", document.where(("profiles",)))


def _override(document: Document, override: str) -> None:
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    path: KeyPath = tuple(keys)
    if not equals or not all(keys):
        raise RecipeError(
            "not of the form key=value", where=where, remedy="for example --set training.epochs=3"
        )
    if path[0] not in TOP_KEYS:
        raise RecipeError(
            f"unknown key {path[0]!r}", where=where, remedy=did_you_mean(str(path[0]), TOP_KEYS)
        )
    for names in CHOSEN_NAMES:
        # One level deeper an unknown name is a mistake; as the last key it makes a new entry.
        if path[: len(names)] == names and len(path) > len(names) + 1:
            known: Any = document.data
            for part in names:
                known = known.get(part) if isinstance(known, dict) else None
            name = str(path[len(names)])
            if isinstance(known, dict) and name not in known:
                raise RecipeError(
                    f"there is no {'.'.join(map(str, names))}.{name}",
                    where=where,
                    remedy=did_you_mean(name, known),
                )
    document.set(document.path_of(keys), parse_value(text, where), where)


def _plugin_files(document: Document) -> tuple[list[Path], list[Problem]]:
    """``plugins: {files: [...]}``, relative to the recipe's directory."""
    section = document.data.get("plugins")
    if section is None:
        return [], []
    parser = Parser(document, Plugins().registry)
    if not isinstance(section, dict) or set(section) != {"files"}:
        parser.problem(("plugins",), "must be a mapping with files", "write plugins: {files: [plugin.py]}")
        return [], parser.problems
    found = []
    for i, text in enumerate(parser.strings(section["files"], ("plugins", "files"))):
        path = Location(text, document.where(), document.path.resolve().parent).path()
        if path.is_file():
            found.append(path)
        else:
            parser.problem(("plugins", "files", i), f"there is no file {text!r} in the recipe's directory")
    return found, parser.problems


def _carried_files(document: Document, own: Sequence[Path], trust: bool) -> tuple[list[Path], list[Problem]]:
    """Plugin files of the bundles that the recipe imports, but those that it names itself.

    Without ``trust`` a problem for each bundle that has any: its code must not run unasked.
    """
    found: dict[str, Path] = {}
    problems = []
    known = {sha256_file(path) for path in own}
    for key, directory in _imported_bundles(document):
        where = document.where(key)
        try:
            files = verified(directory, read_description(directory).get("plugin_files", {}))
        except KdrecipeError as error:
            problems += [Problem(p.what, where, p.remedy) for p in error.problems]
            continue
        strange = {digest: path for path, digest in files.items() if digest not in known}
        if strange and not trust:
            remedy = f"{CONSENT}, or name a copy of the file under plugins: {{files: [...]}}"
            problems.append(refusal(directory, [path.name for path in strange.values()], remedy, where))
        elif trust:
            found |= {digest: path for digest, path in strange.items() if digest not in found}
    return list(found.values()), problems


def _imported_bundles(document: Document) -> Iterator[tuple[KeyPath, Path]]:
    """Key and directory of each ``pretrained`` bundle that exists; malformed keys are reported elsewhere."""
    systems = document.data.get("systems")
    for name, written in systems.items() if isinstance(systems, dict) else ():
        section = written.get("pretrained") if isinstance(written, dict) else None
        text = section.get("bundle") if isinstance(section, dict) else None
        if not isinstance(text, str):
            continue
        key: KeyPath = ("systems", name, "pretrained", "bundle")
        try:
            path = Location(text, document.where(key), document.path.resolve().parent).path()
        except RecipeError:  # an environment variable: looked up when there is work
            continue
        if (path / "bundle.json").is_file():
            yield key, path


def _ask_plugins(recipe: Recipe) -> None:
    """The hook ``check_recipe``."""
    found = recipe.plugins.pm.hook.check_recipe(recipe=recipe)
    parts = [returned(part or (), Iterable, "a plugin", "check_recipe") for part in found]  # type: ignore[type-abstract]
    problems = [p if isinstance(p, Problem) else Problem(str(p)) for part in parts for p in part]
    if problems:
        raise RecipeError(problems)


def _sorted(problems: Sequence[Problem]) -> list[Problem]:
    """By file and line; what is not of a file comes first."""

    def key(problem: Problem) -> tuple[str, int]:
        file, _, line = problem.where.rpartition(":")
        return (file, int(line)) if line.isdecimal() else ("", 0)

    return sorted(problems, key=key)
