"""Finds the exporter that wrote the files of a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrecipe.data.tokens import read_pieces
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Runner
from kdrecipe.plugin.registry import Registry


@dataclass(frozen=True)
class Export:
    """One variant of an export on disk.

    Args:
        name: of the exporter.
        exporter: its class.
        directory: where the files are.
        variant: ``fp32`` or ``int8``; empty if it is not known, for a file from elsewhere.
        file: that file.
    """

    name: str
    exporter: Any
    directory: Path
    variant: str
    file: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Part -> path."""
        if self.file is not None:
            (part,) = next(iter(self.exporter.files.values()))
            return {part: self.file}
        names = self.exporter.files[self.variant]
        return {part: self.directory / name for part, name in names.items()}

    def load(self) -> Runner:
        """Load it, ready to recognise.

        Raises:
            KdrecipeError: a file is damaged, or ``tokens.txt`` is not this model's.
        """
        check_tokens(next(iter(self.files.values())))
        runner: Runner
        if self.file is not None:
            runner = self.exporter.load_file(self.file)
        else:
            runner = self.exporter(self.exporter.Config()).load(self.directory, self.variant)
        return runner


def check_tokens(model: Path) -> None:
    """KdrecipeError unless ``tokens.txt`` beside an ONNX model has as many tokens as the model says.

    Runtimes end the process, or say other words. Models of other kinds and from elsewhere do not say.
    """
    pieces = read_pieces(model.parent / "tokens.txt")
    num_tokens = onnx_properties(model).get("vocab_size", "")
    if num_tokens.isdecimal() and int(num_tokens) != len(pieces):
        raise KdrecipeError(
            f"tokens.txt lists {len(pieces)} tokens, the model has {num_tokens}",
            where=str(model.parent / "tokens.txt"),
            remedy="copy the tokens.txt that the export stage wrote beside the model",
        )


def onnx_properties(model: Path) -> dict[str, str]:
    """What an ONNX file says of itself; empty for files of other kinds.

    Raises:
        KdrecipeError: it is damaged.
    """
    if model.suffix != ".onnx":
        return {}
    import onnx

    try:
        return {p.key: p.value for p in onnx.load(model, load_external_data=False).metadata_props}
    except Exception as error:  # protobuf's own types, which change between versions
        raise KdrecipeError("not an ONNX model, or a damaged one", where=str(model)) from error


def find_exports(path: Path, registry: Registry) -> list[Export]:
    """The variants of the export in a directory, or that of a file; empty if there is none.

    If the files fit several exporters, the exporter with the most files wrote them: a transducer also
    has an encoder and a decoder, but is no attention model. A file with a name that no exporter writes
    belongs to the exporter that loads files with this suffix.
    """
    directory = path if path.is_dir() else path.parent
    found = [
        export
        for name in registry.names("exporters")
        for variant in getattr(registry.get("exporters", name), "files", {})
        if _is_there(export := Export(name, registry.get("exporters", name), directory, variant), path)
    ]
    if not found and path.is_file():
        exporters = {name: registry.get("exporters", name) for name in registry.names("exporters")}
        return [
            Export(name, cls, directory, "", path)
            for name, cls in exporters.items()
            if hasattr(cls, "load_file") and cls.suffix == path.suffix
        ][:1]
    best = max(found, key=lambda export: len(export.files), default=None)
    return [export for export in found if best is not None and export.name == best.name]


def _is_there(export: Export, path: Path) -> bool:
    files = export.files.values()
    return all(file.is_file() for file in files) and (path.is_dir() or path in files)
