"""What each layer of a bundle bears: int8, int4 and pruning of one layer at a time.

Measured on real utterances against the model as it is: the divergence of the log-posteriors along the model's
own greedy path, and the word error rate. Rates are shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import TokenTable
from kdrecipe.measure.edits import Edits
from kdrecipe.measure.layer_changes import CHANGES, Layers
from kdrecipe.measure.layer_time import product_s
from kdrecipe.measure.reference import Reference, reference
from kdrecipe.text import clean

BAD_FACTOR = 20.0  # a layer is bad if it costs so many times the median of the layers ...
BAD_KL = 1e-4  # ... and at least so much, in nats per step: less changes no text
AUDIO_S = 10.0
_FRAMES_PER_S = 100


@dataclass
class _Spoken:
    """Utterances: features, transcripts, and what the model as it is makes of them."""

    features: Sequence[np.ndarray]
    texts: Sequence[str]
    own: Sequence[Reference]


def sensitivity(
    model: Any,
    head: str,
    tokens: TokenTable,
    features: Sequence[np.ndarray],
    texts: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Change one layer after the other and measure.

    Args:
        model: with float weights, on the CPU, in evaluation mode; unchanged afterwards.
        head: by which it is judged.
        tokens: of the model.
        features: (T, F) log-mel of each utterance.
        texts: their transcripts.
        on_progress: called with (changes done, changes in all).

    Returns:
        JSON-like: ``utterances``, ``wer``, ``bytes``, ``layers``: in the order of the model, each with
        ``name``, ``kind``, ``shape``, ``bytes``, ``ms`` (of its product for 10 s of audio in onnxruntime on
        one thread; None: no linear layer), ``outliers`` (input channel -> times the median), and for each
        change (``int8``, ``int4``, ``prune``; None where it can't be): ``kl`` (nats per frame, of attention
        per token), ``wer`` (difference), ``bytes`` and ``ms`` won; ``worst``: change -> names of the layers
        that stand out.

    Raises:
        KdrecipeError: there is no utterance, or no layer that can be changed.
    """
    layers = Layers.of(model)
    if not features or not layers.modules:
        missing = "utterance to measure on" if not features else "linear, convolution or recurrent layer"
        raise KdrecipeError(f"there is no {missing}")
    with layers.listening(), torch.no_grad():
        for features_TF in features:
            out = model.encode(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
            model.greedy(out, head)
    own = [reference(model, head, features_TF) for features_TF in features]
    layers.modules = {name: m for name, m in layers.modules.items() if name in layers.heard}  # of this head
    spoken = _Spoken(features, texts, own)
    _, wer = _measured(model, head, tokens, spoken)
    steps = [(name, change) for name in layers.modules for change in CHANGES]
    rows = {name: _row(layers, name, sum(map(len, features)) / _FRAMES_PER_S) for name in layers.modules}
    for number, (name, change) in enumerate(steps):
        rows[name][change] = None
        if layers.can(name, change):
            with layers.changed(name, change):
                kl, changed_wer = _measured(model, head, tokens, spoken)
            won = layers.num_bytes(name) - layers.num_bytes(name, change)
            rows[name][change] = {"kl": kl, "wer": changed_wer - wer, "bytes": won} | _ms_won(
                rows[name], change
            )
        if on_progress is not None:
            on_progress(number + 1, len(steps))
    return {
        "utterances": len(features),
        "wer": wer,
        "bytes": sum(row["bytes"] for row in rows.values()),
        "layers": list(rows.values()),
        "worst": {change: worst(list(rows.values()), change) for change in CHANGES},
    }


def worst(rows: Sequence[dict[str, Any]], change: str) -> list[str]:
    """The layers that a change costs far more than the others, worst first."""
    costs = {row["name"]: row[change]["kl"] for row in rows if row[change] is not None}
    limit = max(BAD_KL, BAD_FACTOR * median(costs.values())) if costs else 0.0
    found = [name for name, kl in costs.items() if not kl <= limit]  # NaN is the worst
    return sorted(found, key=lambda name: -np.nan_to_num(costs[name], nan=np.inf))


def _measured(model: Any, head: str, tokens: TokenTable, spoken: _Spoken) -> tuple[float, float]:
    """Divergence from the model as it was, in nats per step, and the word error rate."""
    divergence, num_steps, words = 0.0, 0, Edits()
    for features_TF, text, own in zip(spoken.features, spoken.texts, spoken.own, strict=True):
        now = reference(model, head, features_TF, own.path)
        divergence += kl(own.log_probs_MV, now.log_probs_MV)
        num_steps += len(own.log_probs_MV)
        words.add(clean(text).split(), tokens.decode(now.tokens).split())
    return divergence / max(1, num_steps), words.rate


def kl(expected_MV: np.ndarray, found_MV: np.ndarray) -> float:
    """Divergence of log-posteriors, summed over steps, in nats: sum p (log p - log q)."""
    diff_MV = found_MV.astype(np.float64) - expected_MV
    # in this form each term is at least 0, so that rounding can't add up below it
    return float((np.exp(expected_MV.astype(np.float64)) * (np.expm1(diff_MV) - diff_MV)).sum())


def _row(layers: Layers, name: str, audio_s: float) -> dict[str, Any]:
    module, heard = layers.modules[name], layers.heard[name]
    row: dict[str, Any] = {
        "name": name,
        "kind": type(module).__name__,
        "shape": [],
        "bytes": layers.num_bytes(name),
        "ms": None,
        "rows": round(heard.num_rows * AUDIO_S / audio_s),
        "outliers": {str(channel): times for channel, times in heard.outliers.items()},
    }
    if isinstance(module, nn.Linear):
        row["shape"] = [module.in_features, module.out_features]
        row["ms"] = _ms(row, "fp32")
    return row


def _ms(row: dict[str, Any], kind: str) -> float | None:
    seconds = product_s(row["rows"], *row["shape"], kind)
    return None if seconds is None else 1e3 * seconds


def _ms_won(row: dict[str, Any], change: str) -> dict[str, float | None]:
    now = _ms(row, change) if row["shape"] else None
    return {"ms": None if now is None or row["ms"] is None else row["ms"] - now}
