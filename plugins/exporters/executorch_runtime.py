"""ExecuTorch's Python runtime as the measured process starts it; torch is part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def start() -> tuple[str, Callable[[dict[str, Any]], Callable[[Any, int], dict[str, Any]]]]:
    """See :class:`kdrecipe.interfaces.Runtime`."""
    from importlib.metadata import version

    import torch

    from .executorch_ctc import Program
    from .feature_runner import FeatureRunner

    def load(spec: dict[str, Any]) -> Callable[[Any, int], dict[str, Any]]:
        torch.set_num_threads(spec["num_threads"])  # features
        model = Path(spec["files"]["model"])
        runner = FeatureRunner(Program(model, spec["num_threads"]), model.parent)

        def recognise(samples_S: Any, sample_rate: int) -> dict[str, Any]:
            found = runner.transcribe(samples_S, sample_rate)
            pieces = [runner.pieces[i] for i in found.tokens]
            return {"text": found.text, "tokens": pieces, "times_s": found.times_s}

        return recognise

    return f"executorch {version('executorch')}", load
