"""Named parts of the training split, chosen by rule and the same on every machine.

A rule is a mapping with one key: ``{speakers: n}``, ``{utterances: n}``, ``{hours: x}``,
``{fraction: x}`` (of the utterances), ``{listed_in: path}`` (of ids) or ``{except: name}`` (what
another subset leaves over). Subsets of one kind are nested: 5 speakers are among the 10 that the
same seed gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrecipe.corpus.gather import read_lines
from kdrecipe.errors import DataError

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

RULES = ("speakers", "utterances", "hours", "fraction", "listed_in", "except")
LISTS = "*.trans.txt"
"""Files of a directory that list its utterances, as in LibriSpeech."""


def choose_subsets(
    cuts: Sequence[MonoCut], rules: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, list[str]]:
    """Subset name -> ids of its cuts, in the order of ``cuts``.

    Args:
        cuts: the training cuts, without perturbed copies.
        rules: see the module's text.
        seed: which speakers or utterances.

    Raises:
        DataError: a rule is malformed, asks for more than there is, lists nothing of what there
            is, or refers in a circle.
    """
    chosen: dict[str, set[str]] = {}
    waiting = dict(rules)
    while waiting:
        ready = [n for n, rule in waiting.items() if rule.get("except", n) in chosen or "except" not in rule]
        if not ready:
            raise DataError(
                f"subsets that refer to no subset, or to each other: {', '.join(waiting)}",
                where="corpus.subsets",
                remedy="`except` names another subset of the same list",
            )
        for name in ready:
            chosen[name] = _choose(cuts, name, waiting.pop(name), chosen, seed)
    return {name: [c.id for c in cuts if c.id in chosen[name]] for name in rules}


def drawn_over_speakers(cuts: Iterable[MonoCut], num: int | None = None, seed: int = 0) -> list[MonoCut]:
    """``num`` cuts of as many speakers as possible, equally many of each: a small sample of all of them.

    Speakers take turns; which comes first, and which utterances of each, is drawn by ``seed``. The first
    cuts of a larger sample are those of a smaller one, whatever the order of ``cuts``.

    Args:
        cuts: of a split.
        num: None: all of them, in that order.
        seed: of the draw.
    """
    rng = np.random.default_rng([seed, 0xD2A3])
    by_speaker: dict[str, list[MonoCut]] = {}
    for cut in sorted(cuts, key=lambda c: c.id):
        by_speaker.setdefault(_speaker(cut), []).append(cut)
    turns = []
    for place, speaker in enumerate(rng.permutation(sorted(by_speaker)).tolist()):
        own = by_speaker[speaker]
        turns += [(turn, place, own[i]) for turn, i in enumerate(rng.permutation(len(own)))]
    turns.sort(key=lambda item: item[:2])
    return [cut for _, _, cut in turns[:num]]


def _choose(
    cuts: Sequence[MonoCut], name: str, rule: Mapping[str, Any], chosen: Mapping[str, set[str]], seed: int
) -> set[str]:
    where = f"corpus.subsets.{name}"
    if len(rule) != 1 or next(iter(rule)) not in RULES:
        raise DataError(f"not a rule: {dict(rule)}", where=where, remedy=f"one of {', '.join(RULES)}")
    kind, amount = next(iter(rule.items()))
    if kind == "except":
        return {c.id for c in cuts} - chosen[amount]
    if kind == "listed_in":
        return _listed(cuts, Path(amount), where)
    rng = np.random.default_rng([seed, 0x5B5E7])
    if kind == "speakers":
        names = sorted({_speaker(c) for c in cuts})
        _enough(int(amount), len(names), "speakers", where)
        speakers = {names[i] for i in rng.permutation(len(names))[: int(amount)]}
        return {c.id for c in cuts if _speaker(c) in speakers}
    # Sorted, so that the choice does not depend on the order of the manifest.
    shuffled = [sorted(cuts, key=lambda c: c.id)[i] for i in rng.permutation(len(cuts))]
    if kind == "hours":
        ends_h = np.cumsum([c.duration for c in shuffled]) / 3600
        _enough(float(amount), float(ends_h[-1]) if len(ends_h) else 0.0, "hours", where)
        return {c.id for c in shuffled[: int(np.searchsorted(ends_h, float(amount))) + 1]}
    count = int(amount) if kind == "utterances" else round(float(amount) * len(cuts))
    _enough(count, len(cuts), "utterances", where)
    return {c.id for c in shuffled[:count]}


def read_ids(path: Path) -> list[str]:
    """The utterances that a file lists, or the files :data:`LISTS` below a directory; each id once, sorted.

    Args:
        path: of text files whose lines begin with an id each; what follows does not count.

    Raises:
        DataError: there is no such file, it is not text, or it lists nothing.
    """
    files = sorted(path.rglob(LISTS)) if path.is_dir() else [path]
    if not path.exists():
        remedy = "a path to a list of utterances, or to a directory that holds some"
        raise DataError("no such file or directory", where=str(path), remedy=remedy)
    ids: set[str] = set()
    for file in files:
        lines, problems = read_lines(file)
        if problems:
            raise DataError(f"not UTF-8: {problems[0].what}", where=problems[0].where)
        ids.update(line.split()[0] for _, line in lines)
    if not ids:
        what = f"no {LISTS} below this directory" if path.is_dir() else "an empty list"
        raise DataError(what, where=str(path), remedy="each line begins with the id of an utterance")
    return sorted(ids)


def _listed(cuts: Sequence[MonoCut], path: Path, where: str) -> set[str]:
    ids = set(read_ids(path))
    found = {c.id for c in cuts if c.id in ids}
    if not found:
        raise DataError(
            f"lists {len(ids)} utterances (such as {min(ids)!r}), none of which is among the training "
            f"split's {len(cuts)}" + (f" (such as {min(c.id for c in cuts)!r})" if cuts else ""),
            where=f"{where}: {path}",
            remedy="list ids as they are in manifests/train_supervisions.jsonl.gz, or correct corpus.parts",
        )
    return found


def _enough(wanted: float, present: float, unit: str, where: str) -> None:
    if not 0 < wanted <= present:
        raise DataError(
            f"asks for {wanted:g} {unit}, the training split has {present:g}",
            where=where,
            remedy=f"ask for more than 0 and at most {present:g}",
        )


def _speaker(cut: MonoCut) -> str:
    return str(cut.supervisions[0].speaker)
