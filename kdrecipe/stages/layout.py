"""The work directory of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Where everything is below a recipe's work directory.

    Args:
        root: the work directory.
        shared: of trials: the systems that they share with the recipe itself, those of stage 3. All that
            students need or are lies in a folder of its own, since they ask other targets of the teachers.
    """

    root: Path
    shared: frozenset[str] | None = None

    @property
    def students(self) -> Path:
        """Where targets, students and all that comes of them lie."""
        return self.root if self.shared is None else self.root / "trials"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def texts(self) -> Path:
        return self.root / "texts"

    @property
    def lm(self) -> Path:
        return self.root / "lm"

    @property
    def scores(self) -> Path:
        return self.students / "scores"

    @property
    def report(self) -> Path:
        return self.students / "report"

    def system(self, name: str, seed: int) -> Path:
        place = self.root if name in (self.shared or ()) else self.students
        return place / "systems" / name / f"seed{seed}"

    def guard(self, teacher: str) -> Path:
        return self.root / "guard" / teacher

    def targets(self, teacher: str, seed: int) -> Path:
        return self.students / "targets" / teacher / f"seed{seed}"

    def codebooks(self, teacher: str, seed: int) -> Path:
        return self.students / "codebooks" / teacher / f"seed{seed}"

    def said(self, teacher: str, seed: int) -> Path:
        return self.root / "said" / teacher / f"seed{seed}"

    def export(self, name: str, seed: int) -> Path:
        return self.students / "exports" / name / f"seed{seed}"

    def hyps(self, name: str, seed: int) -> Path:
        return self.students / "hyps" / name / f"seed{seed}"
