"""What a model costs on the device, and what it recognises there: a row of ``bench`` and ``compare``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.artifacts import fingerprint
from kdrecipe.corpus.audio import Utterance
from kdrecipe.interfaces import Runtime
from kdrecipe.measure.edits import edits
from kdrecipe.measure.exports import check_tokens, onnx_properties
from kdrecipe.measure.onnx_macs import onnx_macs_per_second
from kdrecipe.measure.runtime import Measurement, measure_files
from kdrecipe.text import clean

PERCENTILES = (50, 95, 99)
NUM_ALL_THREADS = 50  # utterances that are recognised once more, on all threads


@dataclass(frozen=True)
class Shipped:
    """An export to measure.

    Args:
        name: of the row.
        runtime: what runs it.
        files: part -> path; ``tokens.txt`` is beside them.
        variant: ``fp32``, ``int8``, ...; empty for a file from elsewhere.
    """

    name: str
    runtime: Runtime
    files: Mapping[str, Path]
    variant: str = ""

    @property
    def first(self) -> Path:
        """Its first file: the model, or the encoder."""
        return next(iter(self.files.values()))

    @property
    def file_name(self) -> str:
        """The first file's name, and of how many more."""
        more = len(self.files) - 1
        return f"{self.first.name} +{more}" if more else self.first.name


def num_threads() -> int:
    """Threads that this process may run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_row(shipped: Shipped, utterances: Iterable[Utterance]) -> dict[str, Any]:
    """Measure an export in its runtime, in processes of its own.

    Args:
        shipped: the export.
        utterances: at least one, read twice; with transcripts, the row has word errors.

    Returns:
        JSON-like: ``name``, ``model`` (file), ``variant``, ``runtime``, ``params`` (None: the file does not
        say), ``size_mb`` (10^6 bytes), ``macs_per_s`` (of the first file, per second of audio at utterances
        of 10 s; None: not known), ``rtf_median``, ``rtf_p95`` (one thread), ``rtf_all_threads`` (median),
        ``num_threads``, ``latency_s`` (``p50``, ``p95``, ``p99``: from the end of an utterance to its text,
        one thread), ``peak_rss_mb``, ``baseline_rss_mb`` (before the model is loaded), ``load_s``, ``audio``
        (``utterances``, ``duration_s``), and :func:`word_errors`.

    Raises:
        KdrecipeError: there is no utterance, a file is damaged, or the runtime failed.
    """
    check_tokens(shipped.first)
    macs = onnx_macs_per_second(shipped.first)
    references: dict[str, str] = {}

    def noted() -> Iterable[Utterance]:
        for utterance in utterances:
            references[utterance.id] = utterance.text
            yield utterance

    measured = measure_files(shipped.runtime, shipped.files, noted(), label=shipped.variant)
    threads = num_threads()
    on_all = measured
    if threads > 1:
        some = itertools.islice(utterances, NUM_ALL_THREADS)
        on_all = measure_files(
            shipped.runtime, shipped.files, some, num_threads=threads, label=shipped.variant
        )
    return {
        "name": shipped.name,
        "model": shipped.file_name,
        "variant": shipped.variant,
        "runtime": measured.runtime,
        "params": _num_params(shipped.first),
        "size_mb": measured.size_mb,
        "macs_per_s": macs,
        "rtf_median": measured.rtf_median,
        "rtf_p95": measured.rtf_p95,
        "rtf_all_threads": on_all.rtf_median,
        "num_threads": threads,
        "latency_s": latencies_s(measured),
        "peak_rss_mb": measured.peak_rss_mb,
        "baseline_rss_mb": measured.baseline_rss_mb,
        "load_s": measured.load_s,
        "audio": measured.summary()["measured_on"],
        **word_errors(references, measured.texts),
    }


def latencies_s(measured: Measurement) -> dict[str, float]:
    """Percentiles over utterances of the seconds from samples to text."""
    seconds = [u.decode_s for u in measured.utterances]
    return {f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES}


def word_errors(references: Mapping[str, str], hypotheses: Mapping[str, str]) -> dict[str, Any]:
    """Word errors of texts, and what identifies the test set.

    Args:
        references: utterance id -> what is said; without any word, there is nothing to score.
        hypotheses: id -> what was recognised.

    Returns:
        ``wer`` (a share), ``errors`` (id -> [errors, words]) and ``test_set`` (a hash of ids and references);
        all None if there is nothing to score.
    """
    texts = {name: clean(text) for name, text in references.items()}
    if not any(texts.values()):
        return {"wer": None, "errors": None, "test_set": None}
    found = {name: edits(text.split(), clean(hypotheses[name]).split()) for name, text in texts.items()}
    errors = sum(f.errors for f in found.values())
    return {
        "wer": errors / sum(f.length for f in found.values()),
        "errors": {name: [f.errors, f.length] for name, f in found.items()},
        "test_set": fingerprint(sorted(texts.items()))[:16],
    }


def _num_params(model: Path) -> int | None:
    """Of the whole export, as its metadata says; None for models from elsewhere and of other kinds."""
    text = onnx_properties(model).get("num_params", "")
    return int(text) if text.isdecimal() else None
