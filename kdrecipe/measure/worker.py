"""The process that :mod:`kdrecipe.measure.runtime` measures: a runtime and nothing else.

Run as ``python -m kdrecipe.measure.worker SPEC RESULT``, both JSON files. Neither torch nor
lhotse is imported here, nor anything that does: their memory is not the model's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Recognise = Callable[[Any, int], dict[str, Any]]
"""``(samples_S, sample_rate)`` to ``text``, ``tokens`` and ``times_s``."""


def main(spec_path: str, result_path: str) -> None:
    """Recognise the files that the spec lists, one after the other.

    Spec: ``runtime``, ``files`` (part -> path), ``tokens``, ``num_bins``, ``num_threads``,
    ``num_warm_up``, ``audio`` (paths).
    Result: ``runtime``, ``load_s``, ``baseline_rss`` and ``peak_rss`` in bytes, and ``utterances``
    with ``text``, ``tokens``, ``times_s``, ``decode_s`` and ``duration_s``.
    """
    import soundfile

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    runtime, load = RUNTIMES[spec["runtime"]]()  # imports it: that is not the model's memory either
    baseline_rss = _memory("VmRSS")
    start = time.perf_counter()
    recognise = load(spec)
    load_s = time.perf_counter() - start

    def measured(path: str) -> dict[str, Any]:
        samples_S, sample_rate = soundfile.read(path, dtype="float32")
        start = time.perf_counter()
        found = recognise(samples_S, sample_rate)
        decode_s = time.perf_counter() - start
        return {**found, "decode_s": decode_s, "duration_s": len(samples_S) / sample_rate}

    for path in spec["audio"][: spec["num_warm_up"]]:
        measured(path)
    result = {
        "runtime": runtime,
        "load_s": load_s,
        "utterances": [measured(path) for path in spec["audio"]],
        "baseline_rss": baseline_rss,
        "peak_rss": _memory("VmHWM"),
    }
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _sherpa_onnx(kind: str) -> tuple[str, Callable[[dict[str, Any]], Recognise]]:
    """Its version, and what loads a model of this ``kind``."""
    import sherpa_onnx

    build = getattr(sherpa_onnx.OfflineRecognizer, f"from_{kind}")  # type: ignore[attr-defined]

    def load(spec: dict[str, Any]) -> Recognise:
        recogniser = build(
            **spec["files"],
            tokens=spec["tokens"],
            num_threads=spec["num_threads"],
            feature_dim=spec["num_bins"],
        )

        def recognise(samples_S: Any, sample_rate: int) -> dict[str, Any]:
            stream = recogniser.create_stream()
            stream.accept_waveform(sample_rate, samples_S)
            recogniser.decode_stream(stream)
            found = stream.result
            return {
                "text": found.text.strip(),
                "tokens": list(found.tokens),
                "times_s": list(found.timestamps),
            }

        return recognise

    return f"sherpa-onnx {sherpa_onnx.__version__}", load


def _attention() -> tuple[str, Callable[[dict[str, Any]], Recognise]]:
    """The program that lies beside an attention model's files."""
    import onnxruntime

    from kdrecipe_plugins.exporters import attention_runtime

    def load(spec: dict[str, Any]) -> Recognise:
        paths = {part: Path(path) for part, path in {**spec["files"], "tokens": spec["tokens"]}.items()}
        recogniser = attention_runtime.Recogniser(**paths, num_threads=spec["num_threads"])

        def recognise(samples_S: Any, sample_rate: int) -> dict[str, Any]:
            found = recogniser.recognise(samples_S, sample_rate)
            return {"text": found.text, "tokens": [recogniser.pieces[i] for i in found.tokens], "times_s": []}

        return recognise

    return f"onnxruntime {onnxruntime.__version__}", load


RUNTIMES: dict[str, Callable[[], tuple[str, Callable[[dict[str, Any]], Recognise]]]] = {
    "sherpa-onnx ctc": lambda: _sherpa_onnx("zipformer_ctc"),
    "sherpa-onnx transducer": lambda: _sherpa_onnx("transducer"),
    "onnxruntime attention": _attention,
}


def _memory(name: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most so far); without Linux, the most so far."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
