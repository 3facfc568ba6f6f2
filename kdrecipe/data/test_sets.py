"""A split of manifests or of a recipe, as utterances to measure on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdrecipe.corpus.audio import Utterance, utterances_from_cuts
from kdrecipe.corpus.manifests import RECORDINGS
from kdrecipe.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

_BELOW = ("", "manifests", "exp/manifests")  # of what may be named: manifests, a work directory, a recipe


@dataclass(frozen=True)
class TestSet:
    """Utterances of a split, read from disk each time they are asked for.

    Args:
        name: of the split.
        cuts: its utterances.
    """

    __test__ = False  # no test, whatever pytest thinks of its name

    name: str
    cuts: list[MonoCut]

    def __iter__(self) -> Iterator[Utterance]:
        return utterances_from_cuts(self.cuts)

    def __len__(self) -> int:
        return len(self.cuts)


def read_test_set(path: Path, split: str, most: int | None = None) -> TestSet:
    """The utterances of ``split``.

    Args:
        path: a directory with ``<split>_recordings.jsonl.gz`` and ``<split>_supervisions.jsonl.gz``, a
            recipe's work directory, or a recipe's directory with its ``exp``.
        split: ``test``, ``dev``, ...
        most: at most so many, drawn at random, the same ones each time; None: all.

    Raises:
        DataError: no manifests, no such split, or a broken one.
    """
    from kdrecipe.data.features import read_cuts

    folder = find_manifests(path)
    if folder is None:
        raise DataError(
            "there are no manifests (<split>_recordings.jsonl.gz) here",
            where=str(path),
            remedy="give a directory of Lhotse manifests, or a recipe's work directory after stage 0",
        )
    splits = sorted(p.name.removesuffix(RECORDINGS) for p in folder.glob(f"*{RECORDINGS}"))
    if split not in splits:
        remedy = f"--split: {did_you_mean(split, splits)}"
        raise DataError(f"there is no split {split!r}", where=str(folder), remedy=remedy)
    cuts = read_cuts(folder, split)
    if not cuts:
        raise DataError(f"the split {split!r} has no utterances", where=str(folder))
    if most is not None and most < len(cuts):
        cuts = sorted(random.Random(0).sample(cuts, most), key=lambda cut: str(cut.id))
    return TestSet(split, cuts)


def find_manifests(path: Path) -> Path | None:
    """The directory of manifests that ``path`` means; None if there is none."""
    return next((path / x for x in _BELOW if any((path / x).glob(f"*{RECORDINGS}"))), None)
