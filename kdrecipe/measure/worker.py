"""The process that :mod:`kdrecipe.measure.runtime` measures: it loads a runtime and nothing else.

Run as ``python -m kdrecipe.measure.worker SPEC RESULT``, both JSON files. Neither torch nor
Lhotse is imported here, nor a module that imports them: their memory is not the model's.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdrecipe.corpus.segments import joined, segments

Recognise = Callable[[Any, int], dict[str, Any]]
"""``(samples_S, sample_rate)`` to ``text``, ``tokens`` and ``times_s``."""


def main(spec_path: str, result_path: str) -> None:
    """Recognise the files that the spec lists, one after the other.

    Spec: see :class:`kdrecipe.interfaces.Runtime`; also the runtime's ``start``, ``num_warm_up``,
    ``longest_s`` (what is longer is recognised in pieces) and ``audio`` (paths).
    Result: ``runtime``, ``load_s``, ``baseline_rss`` and ``peak_rss`` in bytes, and ``utterances``
    with ``text``, ``tokens``, ``times_s``, ``decode_s`` and ``duration_s``.
    """
    import soundfile

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    runtime, load = _named(spec["start"])()  # imports the runtime, whose memory is not the model's either
    baseline_rss = _memory("VmRSS")
    start = time.perf_counter()
    recognise = load(spec)
    load_s = time.perf_counter() - start

    def measured(path: str) -> dict[str, Any]:
        parts, decode_s = [], 0.0
        with soundfile.SoundFile(path) as file:
            rate, duration_s = file.samplerate, file.frames / file.samplerate
            for at_s, part_S in segments(file.blocks(10 * rate, dtype="float32"), rate, spec["longest_s"]):
                start = time.perf_counter()
                found = recognise(part_S, rate)
                decode_s += time.perf_counter() - start
                parts.append((at_s, found["text"], found["tokens"], found["times_s"]))
        text, tokens, times_s = joined(parts)
        return {
            "text": text,
            "tokens": tokens,
            "times_s": times_s,
            "decode_s": decode_s,
            "duration_s": duration_s,
        }

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


def _named(start: str) -> Callable[[], tuple[str, Callable[[dict[str, Any]], Recognise]]]:
    """The function that ``start`` of a :class:`kdrecipe.interfaces.Runtime` names."""
    module, _, function = start.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None, module
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look up their module there
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)  # type: ignore[no-any-return]


def _memory(name: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the largest so far); the latter, if not on Linux."""
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
