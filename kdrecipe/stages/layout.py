"""The work directory of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Where everything is below a recipe's work directory."""

    root: Path

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
        return self.root / "scores"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def system(self, name: str, seed: int) -> Path:
        return self.root / "systems" / name / f"seed{seed}"

    def guard(self, teacher: str) -> Path:
        return self.root / "guard" / teacher

    def targets(self, teacher: str, seed: int) -> Path:
        return self.root / "targets" / teacher / f"seed{seed}"

    def codebooks(self, teacher: str, seed: int) -> Path:
        return self.root / "codebooks" / teacher / f"seed{seed}"

    def said(self, teacher: str, seed: int) -> Path:
        return self.root / "said" / teacher / f"seed{seed}"

    def export(self, name: str, seed: int) -> Path:
        return self.root / "exports" / name / f"seed{seed}"

    def hyps(self, name: str, seed: int) -> Path:
        return self.root / "hyps" / name / f"seed{seed}"
