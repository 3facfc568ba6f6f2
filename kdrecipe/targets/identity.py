"""Which audio a Lhotse cut is: recorded beside what was computed from it, compared before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.artifacts import fingerprint, sha256_bytes, sha256_file
from kdrecipe.errors import DataError, Problem


def identify(cut: Any) -> dict[str, Any]:
    """JSON-like record of a cut's audio: its hash, the files' state, the span, what is done to it.

    Raises:
        DataError: the cut has no recording, or its audio file is missing.
    """
    if not cut.has_recording:
        raise DataError("the cut has no recording to identify it by", where=cut.id)
    return {"audio": _audio_hash(cut), "stat": _stat(cut), "span": _span(cut)}


def perturbed(cut: Any, record: Mapping[str, Any]) -> Problem | None:
    """The problem of a cut that is another stretch of audio than ``record``, or changed in speed or volume.

    Looks at the manifest only. Lhotse's ``perturb_speed`` and its like keep a cut's custom arrays as
    they were, whatever becomes of the audio.
    """
    if _span(cut) == record["span"]:
        return None
    return Problem(
        "the cut was changed (speed, volume, cropping) after its targets had been computed",
        cut.id,
        "perturb first, as separate cuts (features: {speed_perturb: [...]}), then compute targets",
    )


def audio_changed(cut: Any, record: Mapping[str, Any]) -> bool:
    """Whether the audio is no longer that of ``record``.

    Files are read only if their size or time of change differ from the record's.
    """
    return bool(_stat(cut) != record["stat"] and _audio_hash(cut) != record["audio"])


def _span(cut: Any) -> list[Any]:
    transforms = cut.recording.to_dict().get("transforms") or []
    plain = json.loads(json.dumps(transforms, default=str))
    return [round(cut.start, 6), cut.num_samples, cut.channel, plain]


def _stat(cut: Any) -> list[list[int]]:
    """Size and time of change (ns) of each of the audio files."""
    files = [Path(source.source) for source in cut.recording.sources if source.type == "file"]
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.exists()]


def _audio_hash(cut: Any) -> str:
    """Of the bytes of the audio files; of the samples where there are no files."""
    sources = cut.recording.sources
    if any(source.type != "file" for source in sources):
        return sha256_bytes(np.ascontiguousarray(cut.recording.load_audio()).tobytes())
    missing = [str(source.source) for source in sources if not Path(source.source).exists()]
    if missing:
        raise DataError([Problem("the audio file is missing", path) for path in missing])
    return fingerprint([sha256_file(Path(source.source)) for source in sources])
