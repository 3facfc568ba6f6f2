"""Which exporter wrote the files that a path means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrecipe.interfaces import Runner
from kdrecipe.plugin.registry import Registry


@dataclass(frozen=True)
class Export:
    """One variant of an export on disk.

    Args:
        name: of the exporter.
        exporter: its class.
        directory: where the files are.
        variant: ``fp32`` or ``int8``.
    """

    name: str
    exporter: Any
    directory: Path
    variant: str

    @property
    def files(self) -> dict[str, Path]:
        """Part -> path."""
        names = self.exporter.files[self.variant]
        return {part: self.directory / name for part, name in names.items()}

    def load(self) -> Runner:
        """Ready to recognise."""
        exporter = self.exporter(self.exporter.Config())
        runner: Runner = exporter.load(self.directory, self.variant)
        return runner


def find_exports(path: Path, registry: Registry) -> list[Export]:
    """The variants of the export in a directory, or the one that a file belongs to; empty: there is none.

    Of several exporters whose files are there, the one with most files wrote them: that a transducer
    has an encoder and a decoder does not make it an attention model.
    """
    directory = path if path.is_dir() else path.parent
    found = [
        export
        for name in registry.names("exporters")
        for variant in getattr(registry.get("exporters", name), "files", {})
        if _is_there(export := Export(name, registry.get("exporters", name), directory, variant), path)
    ]
    best = max(found, key=lambda export: len(export.files), default=None)
    return [export for export in found if best is not None and export.name == best.name]


def _is_there(export: Export, path: Path) -> bool:
    files = export.files.values()
    return all(file.is_file() for file in files) and (path.is_dir() or path in files)
