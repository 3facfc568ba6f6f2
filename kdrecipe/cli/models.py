"""What the paths given to ``bench``, ``compare`` and ``demo`` mean: bundles, exports, and their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Exporter
from kdrecipe.measure.device import Shipped
from kdrecipe.recipe.parsing import DEFAULT_EXPORTS
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.suitable import measured_exporter

if TYPE_CHECKING:
    from kdrecipe.model.bundle import Bundle

_SEED = re.compile(r"seed\d+")


def named(text: str) -> tuple[str | None, Path]:
    """``NAME=PATH`` or ``PATH``: the name, if one is given, and the path."""
    name, equals, path = text.partition("=")
    if equals and re.fullmatch(r"[\w.+ -]+", name) and not Path(text).exists():
        return name, Path(path)
    return None, Path(text)


def name_of(path: Path) -> str:
    """The system that a path of a recipe's work directory belongs to; elsewhere the last part of it.

    Of ``exports/kd/seed1/onnx_ctc``, ``systems/kd/seed1`` and ``hyps/kd/seed1/test.jsonl`` that is ``kd``.
    """
    parts = path.absolute().parts
    seeds = [i for i, part in enumerate(parts) if _SEED.fullmatch(part)]
    return parts[seeds[-1] - 1] if seeds and seeds[-1] > 0 else path.absolute().name


def shipped(
    path: Path, scratch: Path, *, name: str | None = None, trust_plugins: bool = False
) -> list[Shipped]:
    """The variants to measure.

    Args:
        path: a bundle's directory, an export's directory, or a file of one.
        scratch: where a bundle is exported to, by the exporter of its first head.
        name: of the system; None: by :func:`name_of`.
        trust_plugins: run the plugin files that a bundle brings.

    Raises:
        KdrecipeError: ``path`` is nothing that can be measured.
    """
    from kdrecipe.measure.exports import find_exports
    from kdrecipe.plugin.loader import load_plugins

    where = path
    if (path / "bundle.json").exists():
        from kdrecipe.model.bundle import Bundle

        bundle = Bundle.load(path, trust_plugins=trust_plugins)
        exporter_of(bundle).export(bundle, scratch)
        name, where, registry = name or bundle.name, scratch, bundle.registry
    else:
        registry = load_plugins().registry
    name = name or name_of(path)
    found = [
        Shipped(name, e.exporter.runtime, e.files, e.variant)
        for e in find_exports(where, registry)
        if e.exporter.runtime
    ]
    if not found:
        raise KdrecipeError(
            "there is neither a bundle (bundle.json) nor an export that can be measured",
            where=str(path),
            remedy="give exp/systems/<system>/seed<k>, or exp/exports/<system>/seed<k>/onnx_ctc",
        )
    return found


def exporter_of(bundle: Bundle) -> Exporter:
    """The exporter of a bundle's first head whose files have a runtime.

    Raises:
        KdrecipeError: there is none.
    """
    registry = bundle.registry
    heads: Sequence[str] = list(bundle.meta["model"]["heads"])
    names = dict.fromkeys([*DEFAULT_EXPORTS, *registry.names("exporters")])  # those that recipes use first
    known = [Named(name) for name in names if name in registry.names("exporters")]
    wanted = measured_exporter(heads, known, registry)
    if wanted is None:
        raise KdrecipeError(
            f"no exporter with a runtime is known for the head {heads[0]!r}",
            where=str(bundle.path),
            remedy="kdrecipe plugins list",
        )
    cls = registry.get("exporters", wanted.name)
    exporter: Exporter = cls(cls.Config())
    return exporter
