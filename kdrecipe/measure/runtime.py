"""Speed and memory of what ships: the exported file in sherpa-onnx, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.data.audio import SAMPLE_RATE, Utterance
from kdrecipe.errors import KdrecipeError

NUM_WARM_UP = 3  # utterances recognised before the clock counts: memory is laid out in the first ones
MODEL_FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}


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
    """What running a model costs. A real-time factor is seconds of work per second of audio.

    Args:
        runtime: its name and version, threads and variant.
        rtf_median: over utterances.
        rtf_p95: 95th percentile over utterances.
        rtf_total: all work over all audio.
        peak_rss_mb: most memory of the whole process, interpreter included, in 10^6 bytes.
        baseline_rss_mb: of the same process before it loaded the model.
        size_mb: of the model file, in 10^6 bytes.
        load_s: seconds to load the model.
        utterances: what was recognised, in the order given.
    """

    runtime: str
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
        """All but the utterances, JSON-like: ``rtf`` (median, p95, total), ``peak_rss_mb``, ..."""
        return {
            "rtf": {"median": self.rtf_median, "p95": self.rtf_p95, "total": self.rtf_total},
            "peak_rss_mb": self.peak_rss_mb,
            "baseline_rss_mb": self.baseline_rss_mb,
            "size_mb": self.size_mb,
            "load_s": self.load_s,
            "runtime": self.runtime,
            "measured_on": {
                "utterances": len(self.utterances),
                "duration_s": sum(u.duration_s for u in self.utterances),
            },
        }


def measure_export(
    directory: Path, variant: str, utterances: Sequence[Utterance], *, num_threads: int = 1
) -> Measurement:
    """Measure a variant that the exporter ``onnx_ctc`` wrote.

    Args:
        directory: holds ``model.onnx`` or ``model.int8.onnx``, and ``tokens.txt``.
        variant: ``fp32`` or ``int8``.
        utterances: at least one; the first three are recognised once before, unmeasured.
        num_threads: of the runtime.

    Raises:
        KdrecipeError: there is no such export, no utterance, or the runtime failed.
    """
    return measure_model(directory / MODEL_FILES[variant], utterances, num_threads=num_threads, label=variant)


def measure_model(
    model: Path, utterances: Sequence[Utterance], *, num_threads: int = 1, label: str = ""
) -> Measurement:
    """The same for a model file with ``tokens.txt`` beside it; ``label`` ends the runtime's name."""
    if not model.is_file():
        raise KdrecipeError(
            "there is no such file",
            where=str(model),
            remedy="speed and memory are measured in sherpa-onnx: list onnx_ctc under export",
        )
    if not utterances:
        raise KdrecipeError("there is no utterance to measure on", where=str(model))
    result = _run_worker(model, utterances, num_threads)
    recognised = tuple(
        Recognised(id=u.id, **found) for u, found in zip(utterances, result["utterances"], strict=True)
    )
    rtfs = [r.decode_s / r.duration_s for r in recognised]
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    return Measurement(
        runtime=", ".join(part for part in (result["runtime"], threads, label) if part),
        rtf_median=float(np.median(rtfs)),
        rtf_p95=float(np.percentile(rtfs, 95)),
        rtf_total=sum(r.decode_s for r in recognised) / sum(r.duration_s for r in recognised),
        peak_rss_mb=result["peak_rss"] / 1e6,
        baseline_rss_mb=result["baseline_rss"] / 1e6,
        size_mb=model.stat().st_size / 1e6,
        load_s=result["load_s"],
        utterances=recognised,
    )


def _run_worker(model: Path, utterances: Sequence[Utterance], num_threads: int) -> dict[str, Any]:
    """Write the audio, start the process, read its result."""
    import soundfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths = [str(directory / f"{i}.wav") for i in range(len(utterances))]
        for path, utterance in zip(paths, utterances, strict=True):
            soundfile.write(path, utterance.samples_S, SAMPLE_RATE, subtype="FLOAT")
        spec = {
            "model": str(model.resolve()),
            "tokens": str((model.parent / "tokens.txt").resolve()),
            "num_bins": _num_bins(model),
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
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if process.returncode or not result.exists():
            last = (process.stderr or process.stdout).strip().splitlines()[-3:]
            raise KdrecipeError(
                f"sherpa-onnx could not run the model: {' '.join(last) or process.returncode}",
                where=str(model),
                remedy="rerun the export stage with --force",
            )
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return content


def _num_bins(model: Path) -> int:
    """Feature bins that the model expects."""
    import onnx

    try:
        shape = onnx.load(model).graph.input[0].type.tensor_type.shape
        return int(shape.dim[2].dim_value)
    except Exception as error:  # protobuf's own types, which change between versions
        raise KdrecipeError("not an ONNX model of speech features", where=str(model)) from error
