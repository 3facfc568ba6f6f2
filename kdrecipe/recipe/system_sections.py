"""What stands under a system of ``recipe.yaml``: ``train``, ``distill``, ``compress``, ``pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from kdrecipe.interfaces import Options
from kdrecipe.recipe.budget import Budget
from kdrecipe.recipe.sections import EMA, Ema, Seeds
from kdrecipe.recipe.validation import short
from kdrecipe.score.keep import Keep

Mappings = Annotated[list[dict[str, Any]], Field(min_length=1)]


class InitFrom(Options):
    """``init_from``: whose weights a system starts with.

    A system's name alone stands for ``{system: <name>}``.
    """

    system: str
    layers: dict[str, Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]] = {}


def _by_name(data: Any) -> Any:
    if isinstance(data, dict | InitFrom | None):
        return data
    if isinstance(data, str):
        return {"system": data}
    raise ValueError(f"is {short(data)}, it must be a system's name, or {{system: <name>, layers: {{...}}}}")


Start = Annotated[InitFrom | None, BeforeValidator(_by_name)]


class TrainSection(Options):
    """``train``: a system trained from labels."""

    model: dict[str, Any]
    data: str | None = None
    losses: Mappings = [{"name": "ctc"}]
    training: dict[str, Any] = {}
    seeds: Seeds | None = None
    init_from: Start = None


class UnlabelledSection(Options):
    """``unlabelled`` of a distilled system: audio whose transcripts are not used.

    Args:
        subset: of the training split, or ``all``.
        labels: one of its teachers, whose hypotheses are labels there.
        keep: which of them.
    """

    subset: str
    labels: str | None = None
    keep: Keep | None = None

    @model_validator(mode="after")
    def _keeps_labels(self) -> UnlabelledSection:
        if self.keep is not None and self.labels is None:
            raise ValueError(
                "keep says which hypotheses are labels; labels names the teacher that gives them"
            )
        return self


def _average_teaches(section: Any) -> Any:
    if section.ema is not None and EMA not in section.teachers:
        raise ValueError(f"ema has options, but is no teacher: write teachers: [..., {EMA}]")
    return section


class DistillSection(Options):
    """``distill``: a system trained with teachers."""

    model: dict[str, Any]
    data: str | None = None
    unlabelled: str | UnlabelledSection | None = None
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    ema: Ema | None = None
    losses: Mappings
    targets: dict[str, Any] = {}
    training: dict[str, Any] = {}
    seeds: Seeds | None = None
    init_from: Start = None

    _has_average = model_validator(mode="after")(_average_teaches)


class CompressSection(Options):
    """``compress``: a system made smaller.

    What it trains with is its parent's, but for what it names itself (:data:`OBJECTIVE`).
    """

    parent: str = Field(alias="from")
    steps: Mappings
    budget: Budget | None = None
    data: str | None = None
    unlabelled: str | UnlabelledSection | None = None
    teachers: tuple[str, ...] = ()
    ema: Ema | None = None
    losses: Mappings | None = None
    targets: dict[str, Any] = {}
    training: dict[str, Any] = {}

    _has_average = model_validator(mode="after")(_average_teaches)


OBJECTIVE = ("data", "unlabelled", "teachers", "ema", "losses", "targets")
"""Keys of a section that say what a system trains with."""


class PretrainedSection(Options):
    """``pretrained``: a bundle made elsewhere; or, with ``name``, what a teacher plugin imports."""

    bundle: str


SECTIONS: Mapping[str, type[Options]] = {
    "train": TrainSection,
    "distill": DistillSection,
    "compress": CompressSection,
    "pretrained": PretrainedSection,
}


class TermSection(Options):
    """A loss without the plugin's options."""

    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    teacher: str | None = None
    start_below: Annotated[float, Field(gt=0)] | None = None
