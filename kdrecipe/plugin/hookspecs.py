# mypy: disable-error-code="empty-body"
"""The hooks, version 1: where plugins enter.

A plugin is a module whose functions carry :data:`kdrecipe.hookimpl` and bear these names. It may
take fewer arguments than a hook offers; an argument with a default is refused, since pluggy never
passes one. Training steps, collation and the checkpoint format are no hooks.

Each hook is documented in ``docs/hooks.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import click
    from torch.optim import Optimizer

    from kdrecipe.errors import Problem
    from kdrecipe.interfaces import Batch, ModelOutput

HOOKS_VERSION = 1

hookspec = pluggy.HookspecMarker("kdrecipe")

Register = Callable[[str, type], None]
"""``register(name, cls)``: options live in ``cls.Config``, a subclass of ``interfaces.Options``."""


class RecipeLike(Protocol):
    """What hooks may rely on of a recipe."""

    @property
    def name(self) -> str:
        """``corpus/name``."""

    @property
    def dir(self) -> Path:
        """The directory of its ``recipe.yaml``."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the systems that do not name any."""

    @property
    def systems(self) -> Mapping[str, Any]:
        """The rows of its table by name: ``kind``, ``model``, ``teachers``, ``parent``, ``terms``, ..."""


class TrainingLike(Protocol):
    """What hooks may rely on of a system's training settings."""

    @property
    def lr(self) -> float:
        """The highest learning rate."""

    @property
    def betas(self) -> tuple[float, float]:
        """Of AdamW."""

    @property
    def weight_decay(self) -> float:
        """On matrices only."""


# ---------------------------------------------------------------- registration


@hookspec(historic=True)
def register_architectures(register: Register) -> None:
    """Register encoders: ``register("conformer", Conformer)``; see ``interfaces.Architecture``."""


@hookspec(historic=True)
def register_heads(register: Register) -> None:
    """Register heads on an encoder; see ``interfaces.Head``."""


@hookspec(historic=True)
def register_losses(register: Register) -> None:
    """Register loss terms, supervised and distilling; see ``interfaces.Loss``."""


@hookspec(historic=True)
def register_teachers(register: Register) -> None:
    """Register imported models that teach; see ``interfaces.Teacher``."""


@hookspec(historic=True)
def register_compressors(register: Register) -> None:
    """Register compression steps; see ``interfaces.Compressor``."""


@hookspec(historic=True)
def register_exporters(register: Register) -> None:
    """Register export formats; see ``interfaces.Exporter``."""


@hookspec(historic=True)
def register_decoders(register: Register) -> None:
    """Register searches; see ``interfaces.Decoder``."""


@hookspec(historic=True)
def register_metrics(register: Register) -> None:
    """Register figures over hypotheses; see ``interfaces.Metric``."""


@hookspec(historic=True)
def register_corpora(register: Register) -> None:
    """Register corpora; see ``interfaces.Corpus``."""


@hookspec(historic=True)
def register_commands(cli: click.Group) -> None:
    """Add commands to ``kdrecipe``: decorate with ``@cli.command()`` or call ``cli.add_command``."""


# ---------------------------------------------------------------- around the work


@hookspec
def check_recipe(recipe: RecipeLike) -> Iterable[Problem | str]:
    """Find further problems in a recipe that is sound so far; an empty list if there are none."""


@hookspec(firstresult=True)
def build_optimizer(params: Iterable[Any], config: TrainingLike) -> Optimizer | None:
    """Make the optimiser of ``params`` (tensors or parameter groups); None leaves it to the next."""


@hookspec
def train_metrics(
    step: int, student: ModelOutput, teacher: Mapping[str, Any], batch: Batch
) -> Mapping[str, float]:
    """Numbers to log, by name; called at log intervals only, without gradients.

    ``teacher`` maps the names of the teachers to their :class:`kdrecipe.interfaces.Targets`; it is
    empty without teachers.
    """


@hookspec
def report_sections(recipe: RecipeLike, results: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Further sections of the report, as pairs (title, text in Markdown)."""
