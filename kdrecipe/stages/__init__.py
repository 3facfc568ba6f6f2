"""One file per stage of the stage table, and the plan that puts them together."""

from __future__ import annotations

STAGES: tuple[tuple[str, str], ...] = (
    ("prepare", "raw corpus -> Lhotse recordings and supervisions, validated"),
    ("features", "manifests -> cut sets with log-mel features, subsets, normalisation"),
    ("tokens", "training text -> SentencePiece tokens, n-gram language model"),
    ("teacher", "train or import the teachers, and see that they have learnt"),
    ("targets", "what the teachers say about the training audio, cached"),
    ("distill", "train the students: from scratch and distilled"),
    ("compress", "prune and quantise"),
    ("export", "ONNX and TorchScript, held to parity with the bundle"),
    ("decode", "hypotheses, real-time factor, memory"),
    ("score", "error rates, intervals, significance, fidelity"),
    ("report", "RESULTS.md, results.json, report.html"),
)
"""Number, verb and purpose of every stage; the same for every recipe."""
