"""Text, time and memory of an export in its runtime, in a separate process.

Each utterance is recognised once, which gives both its text and its time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.corpus.audio import Utterance
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Exporter, Runtime
from kdrecipe.recipe.suitable import RuntimeOptions, default_search

NUM_WARM_UP = 3  # utterances recognised before time is measured: the first ones allocate memory


@dataclass(frozen=True)
class Recognised:
    """One utterance in the runtime.

    Args:
        id: of the utterance.
        text: recognised words.
        tokens: recognised tokens as the runtime writes them.
        times_s: start of each token.
        decode_s: seconds from samples to text, features included.
        duration_s: of the audio.
    """

    id: str
    text: str
    tokens: list[str]
    times_s: list[float]
    decode_s: float
    duration_s: float


@dataclass(frozen=True)
class Measurement:
    """Time and memory of a model. A real-time factor is seconds of work per second of audio.

    Args:
        runtime: its name and version, threads and variant.
        search: the runtime's name of the search that it ran.
        rtf_median: over utterances.
        rtf_p95: 95th percentile over utterances.
        rtf_total: all work over all audio.
        peak_rss_mb: largest memory of the whole process, including the interpreter, in 10^6 bytes.
        baseline_rss_mb: of the same process before it loaded the model.
        size_mb: of the model's files, in 10^6 bytes.
        load_s: seconds to load the model.
        utterances: the results, in the given order.
    """

    runtime: str
    search: str
    rtf_median: float
    rtf_p95: float
    rtf_total: float
    peak_rss_mb: float
    baseline_rss_mb: float
    size_mb: float
    load_s: float
    utterances: tuple[Recognised, ...]

    @property
    def texts(self) -> dict[str, str]:
        """Recognised text by utterance id."""
        return {u.id: u.text for u in self.utterances}

    def summary(self) -> dict[str, Any]:
        """Everything except the utterances, JSON-like: ``rtf`` (median, p95, total), ``peak_rss_mb``, ..."""
        return {
            "rtf": {"median": self.rtf_median, "p95": self.rtf_p95, "total": self.rtf_total},
            "peak_rss_mb": self.peak_rss_mb,
            "baseline_rss_mb": self.baseline_rss_mb,
            "size_mb": self.size_mb,
            "load_s": self.load_s,
            "runtime": self.runtime,
            "runtime_search": self.search,
            "measured_on": {
                "utterances": len(self.utterances),
                "duration_s": sum(u.duration_s for u in self.utterances),
            },
        }


def measure_export(
    exporter: Exporter | type[Exporter],
    directory: Path,
    variant: str,
    utterances: Iterable[Utterance],
    *,
    search: RuntimeOptions | None = None,
    num_threads: int = 1,
    longest_s: float = LONGEST_S,
) -> Measurement:
    """Measure a variant that an exporter wrote, in the exporter's runtime.

    Args:
        exporter: or its class.
        directory: holds the variant's files, and ``tokens.txt``.
        variant: ``fp32`` or ``int8``.
        utterances: at least one, recognised one after the other; the first three are recognised once
            before, without measuring.
        search: see :func:`kdrecipe.recipe.suitable.runtime_search`; None: the runtime's default.
        num_threads: of the runtime.
        longest_s: utterances that are longer are recognised in pieces.

    Raises:
        KdrecipeError: there is no such export, no utterance or no runtime to measure it in, or the
            runtime failed.
    """
    files = {part: Path(directory) / name for part, name in exporter.files[variant].items()}
    return measure_files(
        exporter.runtime,
        files,
        utterances,
        search=search,
        num_threads=num_threads,
        longest_s=longest_s,
        label=variant,
    )


def measure_files(
    runtime: Runtime | None,
    files: Mapping[str, Path],
    utterances: Iterable[Utterance],
    *,
    search: RuntimeOptions | None = None,
    num_threads: int = 1,
    longest_s: float = LONGEST_S,
    label: str = "",
) -> Measurement:
    """The same for files (part -> path) with ``tokens.txt`` beside them; ``label`` is added to the name."""
    where = str(next(iter(files.values())))
    if runtime is None:
        raise KdrecipeError("the exporter has no runtime to measure it in", where=where)
    for path in files.values():
        if not path.is_file():
            raise KdrecipeError(
                "there is no such file",
                where=str(path),
                remedy="speed and memory are measured on an export: rerun the export stage",
            )
    search = search or default_search(runtime)
    settings = {"search": search.name, "options": dict(search.options), "longest_s": longest_s}
    ids, result = _run_worker(runtime, settings, files, utterances, num_threads)
    recognised = tuple(Recognised(id=i, **found) for i, found in zip(ids, result["utterances"], strict=True))
    rtfs = [r.decode_s / r.duration_s for r in recognised]
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return Measurement(
        runtime=", ".join(part for part in (result["runtime"], threads, label) if part),
        search=search.name,
        rtf_median=float(np.median(rtfs)),
        rtf_p95=float(np.percentile(rtfs, 95)),
        rtf_total=sum(r.decode_s for r in recognised) / sum(r.duration_s for r in recognised),
        peak_rss_mb=result["peak_rss"] / 1e6,
        baseline_rss_mb=result["baseline_rss"] / 1e6,
        size_mb=sum(path.stat().st_size for path in files.values()) / 1e6,
        load_s=result["load_s"],
        utterances=recognised,
    )


def _run_worker(
    runtime: Runtime,
    settings: Mapping[str, Any],
    files: Mapping[str, Path],
    utterances: Iterable[Utterance],
    num_threads: int,
) -> tuple[list[str], dict[str, Any]]:
    """Write the audio, start the process, read its result; also the utterances' ids."""
    import soundfile

    first = next(iter(files.values()))

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ids, paths = [], []
        for number, utterance in enumerate(utterances):
            ids.append(utterance.id)
            paths.append(str(directory / f"{number}.wav"))
            soundfile.write(paths[-1], utterance.samples_S, SAMPLE_RATE, subtype="FLOAT")
        if not ids:
            raise KdrecipeError("there is no utterance to measure on", where=str(first))
        spec = {
            "start": runtime.start,
            **settings,
            "files": {part: str(path.resolve()) for part, path in files.items()},
            "tokens": str((first.parent / "tokens.txt").resolve()),
            "num_bins": _num_bins(first),
            "num_threads": num_threads,
            "num_warm_up": NUM_WARM_UP,
            "audio": paths,
        }
        (directory / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        result = directory / "result.json"
        command = [
            sys.executable,
            "-m",
            "kdrecipe.measure.worker",
            str(directory / "spec.json"),
            str(result),
        ]
        # Several threads must not spin while they wait, since that takes cores from other work.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(num_threads)}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if process.returncode or not result.exists():
            last = (process.stderr or process.stdout).strip().splitlines()[-3:]
            raise KdrecipeError(
                f"{runtime.name} could not run the model: {' '.join(last) or process.returncode}",
                where=str(first),
                remedy="rerun the export stage with --force",
            )
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return ids, content


def _num_bins(model: Path) -> int | None:
    """Feature bins that an ONNX model expects; None: it takes audio, or is a file of another kind."""
    if model.suffix != ".onnx":
        return None
    import onnx

    try:
        dims = onnx.load(model).graph.input[0].type.tensor_type.shape.dim
        return int(dims[2].dim_value) if len(dims) > 2 else None
    except Exception as error:  # protobuf's own types, which change between versions
        raise KdrecipeError("not an ONNX model of speech features", where=str(model)) from error
