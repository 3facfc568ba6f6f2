"""Size, speed and memory of a bundle or an export, on one thread of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdrecipe.corpus.audio import Utterance, read_audio, resample
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Exporter, Runtime
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.suitable import measured_exporter

if TYPE_CHECKING:
    from kdrecipe.model.bundle import Bundle

NUM_SYNTHETIC = 20
SYNTHETIC_S = (2.0, 10.0)  # durations of the synthetic utterances, evenly spread between these


def bench(
    path: Path | str, audio_files: Sequence[Path | str] = (), *, trust_plugins: bool = False
) -> list[dict[str, object]]:
    """Measure every variant and print a table.

    Args:
        path: a bundle's directory (exported for the purpose, by its first head), an export's directory,
            or an ``.onnx`` file of one.
        audio_files: what to recognise; none: 20 synthetic utterances of 2 to 10 s. The search is greedy,
            so the time does not depend on what is said.
        trust_plugins: run the plugin files that a bundle brings.

    Returns:
        A row per variant: ``model``, ``params``, ``size_mb``, ``rtf_median``, ``rtf_p95``,
        ``peak_rss_mb``, ``baseline_rss_mb``, ``load_s`` and ``runtime``.

    Raises:
        KdrecipeError: ``path`` is nothing that can be measured.
        DataError: audio can't be read.
    """
    utterances = _read(audio_files) if audio_files else _synthetic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [_row(model, utterances) for model in _models(Path(path), Path(scratch), trust_plugins)]
    print(f"{len(utterances)} utterances, {sum(u.duration_s for u in utterances):.0f} s of audio")
    print(table(rows))
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    """Rows of :func:`bench` for the terminal."""
    head = f"{'model':<16} {'params':>10} {'size MB':>8} {'RTF median':>11} {'RTF p95':>9} "
    head += f"{'peak MB':>8} {'(empty)':>8}  runtime"
    lines = [
        f"{r['model']:<16} {r['params']:>10} {r['size_mb']:8.2f} {r['rtf_median']:11.5f} {r['rtf_p95']:9.5f} "
        f"{r['peak_rss_mb']:8.1f} {r['baseline_rss_mb']:8.1f}  {r['runtime']}"
        for r in rows
    ]
    return "\n".join([head, *lines])


@dataclass(frozen=True)
class _Measured:
    """What to measure: files (part -> path) in a runtime; ``label`` ends the runtime's name."""

    name: str
    runtime: Runtime
    files: dict[str, Path]
    label: str = ""


def _models(path: Path, scratch: Path, trust_plugins: bool) -> list[_Measured]:
    """What ``path`` means; a bundle is exported to ``scratch``."""
    from kdrecipe.measure.exports import find_exports
    from kdrecipe.plugin.loader import load_plugins

    if (path / "bundle.json").exists():
        from kdrecipe.model.bundle import Bundle

        bundle = Bundle.load(path, trust_plugins=trust_plugins)
        _exporter(bundle).export(bundle, scratch)
        path, registry = scratch, bundle.registry
    else:
        registry = load_plugins().registry
    found = [
        _Measured(_name(e.files), e.exporter.runtime, e.files, e.variant)
        for e in find_exports(path, registry)
        if e.exporter.runtime
    ]
    if not found:
        raise KdrecipeError(
            "there is neither a bundle (bundle.json) nor an export that can be measured",
            where=str(path),
            remedy="give exp/systems/<system>/seed<k>, or exp/exports/<system>/seed<k>/onnx_ctc",
        )
    return found


def _name(files: dict[str, Path]) -> str:
    """The file's name, of several the first one's and how many more."""
    first, *more = (path.name for path in files.values())
    return f"{first} +{len(more)}" if more else first


def _exporter(bundle: Bundle) -> Exporter:
    """The exporter of a bundle's first head."""
    registry = bundle.registry
    heads = list(bundle.meta["model"]["heads"])
    wanted = measured_exporter(heads, [Named(name) for name in registry.names("exporters")], registry)
    if wanted is None:
        raise KdrecipeError(
            f"no exporter with a runtime is known for the head {heads[0]!r}",
            where=str(bundle.path),
            remedy="kdrecipe plugins list",
        )
    cls = registry.get("exporters", wanted.name)
    exporter: Exporter = cls(cls.Config())
    return exporter


def _row(model: _Measured, utterances: Sequence[Utterance]) -> dict[str, object]:
    from kdrecipe.measure.exports import check_tokens
    from kdrecipe.measure.runtime import measure_files

    check_tokens(next(iter(model.files.values())))
    measured = measure_files(model.runtime, model.files, utterances, label=model.label)
    return {
        "model": model.name,
        "params": _num_params(next(iter(model.files.values()))),
        "size_mb": measured.size_mb,
        "rtf_median": measured.rtf_median,
        "rtf_p95": measured.rtf_p95,
        "peak_rss_mb": measured.peak_rss_mb,
        "baseline_rss_mb": measured.baseline_rss_mb,
        "load_s": measured.load_s,
        "runtime": measured.runtime,
    }


def _num_params(model: Path) -> str:
    """Of the whole export, as its metadata says; ``?`` for models from elsewhere and of other kinds."""
    from kdrecipe.measure.exports import onnx_properties

    return onnx_properties(model).get("num_params", "?")


def _read(audio_files: Sequence[Path | str]) -> list[Utterance]:
    return [Utterance(str(file), resample(*read_audio(file))) for file in audio_files]


def _synthetic() -> list[Utterance]:
    """Noise with the loudness of speech."""
    rng = np.random.default_rng(0)
    durations_s = np.linspace(*SYNTHETIC_S, NUM_SYNTHETIC)
    rng.shuffle(durations_s)
    return [
        Utterance(f"synthetic-{i}", (0.1 * rng.standard_normal(round(d * SAMPLE_RATE))).astype(np.float32))
        for i, d in enumerate(durations_s)
    ]
