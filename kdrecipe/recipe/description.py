"""What is relied on in a ``bundle.json``: bundles come from elsewhere, and people edit what they can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdrecipe.errors import KdrecipeError, Problem


def check_description(meta: dict[str, Any], path: Path) -> None:
    """KdrecipeError naming every field of a bundle's description that is missing or of the wrong kind."""
    remedy = "take the bundle as it was written: its bundle.json was changed since, or is cut short"
    if problems := [Problem(what, str(path), remedy) for what in faults(meta)]:
        raise KdrecipeError(problems)


def faults(meta: dict[str, Any], *, absent: bool = True) -> list[str]:
    """What is wrong with the fields of a bundle's description; ``absent``: and which are missing."""
    try:
        Description.model_validate(meta)
    except ValidationError as error:
        found = [e for e in error.errors() if absent or e["type"] != "missing"]
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found]
    return []


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Model(_Part):
    name: str
    heads: dict[str, dict[str, Any] | None] = Field(min_length=1)


class _Features(_Part):
    name: str
    num_mel_bins: int = Field(ge=1, le=10_000)


class _Step(_Part):
    name: str
    options: dict[str, Any] = {}
    state: dict[str, Any] | None = None


class _Shifts(_Part):
    heads: dict[str, float] = {}
    taps: dict[str, float] = {}


class Description(_Part):
    """What is relied on in a ``bundle.json``; whatever else it says is for people and for the report."""

    name: str
    model: _Model
    features: _Features
    compression: list[_Step] = []
    vocab_id: str
    weights_sha256: str
    params: int
    number_format: str
    frame_shift_s: float
    frame_shifts_s: _Shifts

    @model_validator(mode="after")
    def _every_head_has_a_shift(self) -> Description:
        if lacking := set(self.model.heads) - set(self.frame_shifts_s.heads):
            raise ValueError(f"frame_shifts_s.heads lacks {', '.join(sorted(lacking))}")
        return self
