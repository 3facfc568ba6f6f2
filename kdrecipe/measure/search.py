"""The time of a search on the bundle in torch, on one thread, from samples to text.

This is slower than what ships, but the same for every search, also for those that no runtime has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdrecipe.corpus.audio import Utterance
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Decoder, Hypothesis
from kdrecipe.measure.runtime import NUM_WARM_UP

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def search_rtf(
    model: nn.Module, decoder: Decoder, features: Mapping[str, Any], utterances: Sequence[Utterance]
) -> float:
    """Seconds of work per second of audio, features included, one utterance at a time.

    Args:
        model: on the CPU, in evaluation mode.
        decoder: the search.
        features: how the model's features are computed, from its bundle.
        utterances: at least one; the first three are recognised once before, without measuring.

    Raises:
        KdrecipeError: there is no utterance.
    """
    if not utterances:
        raise KdrecipeError("there is no utterance to measure a search on")
    with _one_thread():
        for utterance in utterances[:NUM_WARM_UP]:
            recognise(model, decoder, features, utterance.samples_S)
        start = time.perf_counter()
        for utterance in utterances:
            recognise(model, decoder, features, utterance.samples_S)
        seconds = time.perf_counter() - start
    return seconds / sum(u.duration_s for u in utterances)


def recognise(
    model: nn.Module, decoder: Decoder, features: Mapping[str, Any], samples_S: np.ndarray
) -> Hypothesis:
    """One utterance of 16 kHz samples in [-1, 1]; the other arguments as for :func:`search_rtf`."""
    import torch

    from kdrecipe.data.features import extract

    features_TF = extract(samples_S, SAMPLE_RATE, features)
    with torch.no_grad():
        out = model(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
        return decoder.decode(model, out)[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
