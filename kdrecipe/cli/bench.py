"""Size, speed, memory and, on a test set, word errors of a bundle or an export on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.corpus.audio import Utterance, read_audio, resample
from kdrecipe.errors import DataError, KdrecipeError, Problem
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.report.device import bench_table

if TYPE_CHECKING:
    from kdrecipe.data.test_sets import TestSet

FORMAT = 1
NUM_SYNTHETIC = 20
SYNTHETIC_S = (2.0, 10.0)  # durations of the synthetic utterances, evenly spread between these


def bench(
    path: Path | str,
    audio_files: Sequence[Path | str] = (),
    *,
    data: Path | None = None,
    split: str = "test",
    most: int | None = None,
    out: Path | None = None,
    trust_plugins: bool = False,
) -> list[dict[str, Any]]:
    """Measure every variant and print a table.

    Args:
        path: a bundle's directory (exported for the purpose, by its first head), an export's directory,
            or a file of one; ``NAME=PATH`` names the rows.
        audio_files: what to recognise; none, and no ``data``: 20 synthetic utterances of 2 to 10 s. The
            search is greedy, so the time does not depend on what is said.
        data: manifests or a recipe's work directory, see :func:`kdrecipe.data.test_sets.read_test_set`; rows
            then have word errors.
        split: of ``data``.
        most: at most so many utterances of it.
        out: a file to write the rows to, as :func:`read_bench` reads them.
        trust_plugins: run the plugin files that a bundle brings.

    Returns:
        A row per variant, see :func:`kdrecipe.measure.device.device_row`.

    Raises:
        KdrecipeError: ``path`` is nothing that can be measured, or both audio and data are given.
        DataError: audio or data can't be read.
    """
    utterances = to_recognise(audio_files, data, split, most)
    rows = measure(str(path), utterances, trust_plugins=trust_plugins)
    audio = rows[0]["audio"]
    print(f"{audio['utterances']} utterances, {audio['duration_s']:.0f} s of audio")
    print(bench_table(rows))
    if out is not None:
        write_bench(out, rows)
        print(f"written to {out}")
    return rows


def measure(
    text: str, utterances: Iterable[Utterance], *, trust_plugins: bool = False
) -> list[dict[str, Any]]:
    """Rows of what ``text`` (``PATH`` or ``NAME=PATH``) means; errors as of :func:`bench`."""
    from kdrecipe.cli.models import named, shipped
    from kdrecipe.measure.device import device_row

    name, path = named(text)
    with tempfile.TemporaryDirectory() as scratch:
        models = shipped(path, Path(scratch), name=name, trust_plugins=trust_plugins)
        return [device_row(model, utterances) for model in models]


def write_bench(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the machine that they were measured on, in words."""
    from kdrecipe.model.bundle import machine

    write_json(path, {"format": FORMAT, "machine": machine(), "rows": list(rows)})


def read_bench(path: Path) -> list[dict[str, Any]]:
    """The rows that :func:`write_bench` wrote.

    Raises:
        KdrecipeError: the file is missing or no such file.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) and content.get("format") == FORMAT else None
    needed = {"name", "model", "variant", "size_mb", "rtf_median", "wer", "errors", "test_set"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= set(row) for row in rows):
        raise KdrecipeError(
            "not the bench.json of this version", where=str(path), remedy="make it with kdrecipe bench --out"
        )
    return rows


def to_recognise(
    audio_files: Sequence[Path | str], data: Path | None, split: str = "test", most: int | None = None
) -> list[Utterance] | TestSet:
    """The utterances that :func:`bench` documents."""
    if data is not None:
        from kdrecipe.data.test_sets import read_test_set

        if audio_files:
            raise KdrecipeError("give audio files or --data, not both")
        return read_test_set(data, split, most)
    missing = [Problem("there is no such file", str(f)) for f in audio_files if not Path(f).is_file()]
    if missing:
        raise DataError(missing)
    return [Utterance(str(f), resample(*read_audio(f))) for f in audio_files] or _synthetic()


def _synthetic() -> list[Utterance]:
    """Noise with the loudness of speech."""
    rng = np.random.default_rng(0)
    durations_s = np.linspace(*SYNTHETIC_S, NUM_SYNTHETIC)
    rng.shuffle(durations_s)
    return [
        Utterance(f"synthetic-{i}", (0.1 * rng.standard_normal(round(d * SAMPLE_RATE))).astype(np.float32))
        for i, d in enumerate(durations_s)
    ]
