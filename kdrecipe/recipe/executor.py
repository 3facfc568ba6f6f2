"""Where jobs run, and with what: ``--executor NAME|FILE`` and ``--set executor.KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.interfaces import Options
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.validation import Validator
from kdrecipe.recipe.yaml import Document, load_yaml, parse_value

PREFIX = "executor."


class LocalOptions(Options):
    """``local``: processes on this machine, ``--jobs`` of them."""

    name: Literal["local"] = "local"


class SlurmOptions(Options):
    """``slurm``: array jobs, through the package ``submitit``.

    Args:
        partition: null: the cluster's default.
        account: who pays; null: the cluster's default.
        time_min: minutes after which Slurm ends a job; what is interrupted is submitted again.
        gpus: per job.
        cpus: per job.
        memory_gb: per job.
        nproc: processes of ``torchrun`` per job that trains; 1: none of its own.
        at_most: jobs of an array at the same time.
        more: further options of sbatch, ``{constraint: h100}``.
        cluster: ``local`` runs the jobs on this machine, to try it.
    """

    name: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    time_min: int = Field(default=1440, ge=1)
    gpus: int = Field(default=0, ge=0)
    cpus: int = Field(default=4, ge=1)
    memory_gb: float = Field(default=16.0, gt=0)
    nproc: int = Field(default=1, ge=1)
    at_most: int = Field(default=64, ge=1)
    more: dict[str, str | int | bool] = Field(default_factory=dict)
    cluster: Literal["slurm", "local"] = "slurm"


class DaskOptions(Options):
    """``dask``: tasks of the package ``distributed``.

    Args:
        address: of a scheduler, ``tcp://host:8786``; null: workers on this machine, ``--jobs`` of them.
    """

    name: Literal["dask"] = "dask"
    address: str | None = None


ExecutorOptions = LocalOptions | SlurmOptions | DaskOptions

_KINDS: dict[str, type[ExecutorOptions]] = {"local": LocalOptions, "slurm": SlurmOptions, "dask": DaskOptions}


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the recipe, and those of the executor without their prefix."""
    mine = [o for o in overrides if o.startswith(PREFIX)]
    return [o for o in overrides if o not in mine], [o.removeprefix(PREFIX) for o in mine]


def load_executor(text: str, overrides: Sequence[str] = ()) -> ExecutorOptions:
    """The options of an executor.

    Args:
        text: ``local``, ``slurm``, ``dask``, or a YAML file with ``name`` and options.
        overrides: ``key=value``.

    Raises:
        RecipeError: there is no such executor or file, or an option is unknown or wrong; all at once.
    """
    if text in _KINDS:
        document = Document(Path(text), {"name": text}, {(): f"--executor {text}"})
    elif Path(text).suffix in (".yaml", ".yml"):
        document = load_yaml(Path(text))
    else:
        remedy = f"{did_you_mean(text, _KINDS)}; or a YAML file"
        raise RecipeError(f"there is no executor {text!r}", where=f"--executor {text}", remedy=remedy)
    for override in overrides:
        key, equals, value = override.partition("=")
        where = f"--set {PREFIX}{override}"
        if not equals:
            raise RecipeError("not of the form key=value", where=where)
        document.set(tuple(key.split(".")), parse_value(value, where), where)
    name = document.data.get("name")
    if not isinstance(name, str) or name not in _KINDS:
        what = f"name: is {name!r}, it must be one of {', '.join(_KINDS)}"
        raise RecipeError(what, where=document.where(("name",)))
    validator = Validator(document, Registry())
    options = validator.validate(_KINDS[name], document.data, ())
    if options is None:
        raise RecipeError(validator.problems)
    return options
