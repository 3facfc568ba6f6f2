"""The process that :mod:`kdrecipe.measure.runtime` measures: sherpa-onnx and nothing else.

Run as ``python -m kdrecipe.measure.worker SPEC RESULT``, both JSON files. Neither torch nor
lhotse is imported here, nor anything that does: their memory is not the model's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(spec_path: str, result_path: str) -> None:
    """Recognise the files that the spec lists, one after the other.

    Spec: ``model``, ``tokens``, ``num_bins``, ``num_threads``, ``num_warm_up``, ``audio`` (paths).
    Result: ``runtime``, ``load_s``, ``baseline_rss`` and ``peak_rss`` in bytes, and ``utterances``
    with ``text``, ``tokens``, ``times_s``, ``decode_s`` and ``duration_s``.
    """
    import sherpa_onnx
    import soundfile

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    baseline_rss = _memory("VmRSS")
    start = time.perf_counter()
    recogniser = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(  # type: ignore[attr-defined]
        model=spec["model"],
        tokens=spec["tokens"],
        num_threads=spec["num_threads"],
        feature_dim=spec["num_bins"],
    )
    load_s = time.perf_counter() - start

    def recognise(path: str) -> dict[str, Any]:
        samples_S, sample_rate = soundfile.read(path, dtype="float32")
        start = time.perf_counter()
        stream = recogniser.create_stream()
        stream.accept_waveform(sample_rate, samples_S)
        recogniser.decode_stream(stream)
        decode_s = time.perf_counter() - start
        return {
            "text": stream.result.text.strip(),
            "tokens": list(stream.result.tokens),
            "times_s": list(stream.result.timestamps),
            "decode_s": decode_s,
            "duration_s": len(samples_S) / sample_rate,
        }

    for path in spec["audio"][: spec["num_warm_up"]]:
        recognise(path)
    result = {
        "runtime": f"sherpa-onnx {sherpa_onnx.__version__}",
        "load_s": load_s,
        "utterances": [recognise(path) for path in spec["audio"]],
        "baseline_rss": baseline_rss,
        "peak_rss": _memory("VmHWM"),
    }
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


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
