"""What teachers say about utterances: computed live, or cached."""

from __future__ import annotations

from typing import Protocol

from kdrecipe.interfaces import Batch, Targets


class TargetSource(Protocol):
    """A teacher as training asks it, live or cached."""

    @property
    def hears_audio(self) -> bool:
        """Whether batches must carry audio."""

    def targets(self, batch: Batch) -> Targets:
        """What it says about ``batch`` (before SpecAugment; on any device), row by row."""
