"""Corpora."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kdrecipe.interfaces.common import Options

if TYPE_CHECKING:
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet


@dataclass
class Prepared:
    """A corpus plugin's result.

    Args:
        splits: name (``train``, ``dev``, ``test``) -> recordings and supervisions.
        problems: what is wrong with the input, one entry each: all of them, not the first.
        notes: facts that the report must state (``25 of 99 test sentences occur in train``).
    """

    splits: dict[str, tuple[RecordingSet, SupervisionSet]]
    problems: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Corpus(Protocol):
    """A corpus, built as ``cls(config)``.

    May have ``split_names``, the splits that it will give where its options say so much: then a recipe that
    decodes any other is refused before any work, instead of after stage 0.
    """

    Config: ClassVar[type[Options]]

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Manifests from the raw corpus in ``corpus_dir``; synthesised audio goes to ``out_dir``."""
