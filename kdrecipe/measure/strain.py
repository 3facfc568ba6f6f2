"""What strains number formats: long audio, and a click that a scale for the whole utterance would follow.

S samples, T frames, M steps of a path, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdrecipe.corpus.audio import Utterance
from kdrecipe.data.features import extract
from kdrecipe.interfaces import SAMPLE_RATE, Runner
from kdrecipe.measure.reference import Reference, along, reference

LENGTHS_S = (5, 20, 40)
CLICK = "click"
TOKENS_PER_S = 4.0  # that are looked at


def strained(utterances: Sequence[Utterance]) -> dict[str, np.ndarray]:
    """``5 s``, ``20 s``, ``40 s``: utterances in a row, over and over if need be, cut to that length;
    ``click``: the first of these with one sample at full scale in its middle."""
    sound_S = np.concatenate([u.samples_S for u in utterances])
    found = {f"{length} s": np.resize(sound_S, length * SAMPLE_RATE) for length in LENGTHS_S}
    clicked_S = found[f"{LENGTHS_S[0]} s"].copy()
    clicked_S[len(clicked_S) // 2] = 1.0
    return {**found, CLICK: clicked_S}


class Strain:
    """Strained audio and what a model says of it.

    Args:
        model: the bundle's.
        head: of it.
        utterances: some.
        features: description of the features.
        spoken: tokens of each utterance. A decoder is compared along these in a row: one that finds no end,
            as after little training, would say a token per frame, each slower than the one before.
    """

    def __init__(
        self,
        model: Any,
        head: str,
        utterances: Sequence[Utterance],
        features: Mapping[str, Any],
        spoken: Sequence[Sequence[int]],
    ) -> None:
        samples = strained(utterances)
        self.features = {name: extract(x, SAMPLE_RATE, dict(features)) for name, x in samples.items()}
        row = [token for tokens in spoken for token in tokens]
        self._paths = {
            name: np.resize(row, round(TOKENS_PER_S * len(x) / SAMPLE_RATE)).tolist() if row else []
            for name, x in samples.items()
        }
        self.expected = self.by(model, head)

    def by(self, model: Any, head: str) -> dict[str, Reference]:
        """What another model says."""
        if head == "attention":
            return {name: along(model, head, x, self._paths[name]) for name, x in self.features.items()}
        return {name: reference(model, head, x) for name, x in self.features.items()}

    def compare(self, runner: Runner, expected: Mapping[str, Reference]) -> dict[str, dict[str, float]]:
        """Condition -> ``max_log_prob_diff``, ``kl`` (nats per step) and ``step_error``, the share of steps
        of the model's path at which another token is the likeliest."""
        found = {}
        for name, features_TF in self.features.items():
            wanted_MV = expected[name].log_probs_MV.astype(np.float64)
            lens_B = np.array([len(features_TF)])
            (got_MV,) = runner.log_probs_along(features_TF[None], lens_B, [expected[name].path])
            if got_MV.shape != wanted_MV.shape:
                found[name] = dict.fromkeys(("max_log_prob_diff", "kl", "step_error"), float("inf"))
                continue
            diff_MV = got_MV - wanted_MV
            kl = np.exp(wanted_MV) * (np.expm1(diff_MV) - diff_MV)
            found[name] = {
                "max_log_prob_diff": float(np.abs(diff_MV).max(initial=0.0)),
                "kl": float(kl.sum(-1).mean()) if len(kl) else 0.0,
                "step_error": float((got_MV.argmax(-1) != wanted_MV.argmax(-1)).mean()) if len(kl) else 0.0,
            }
        return found
