"""The time of a search on the bundle in torch, on one thread, from samples to text.

This is slower than what ships, but the same for every search, also for those that no runtime has.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from kdrecipe.corpus.audio import Utterance, recognise_long, resample
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Decoder, Hypothesis
from kdrecipe.measure.runtime import NUM_WARM_UP

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


def search_rtf(
    model: nn.Module,
    decoder: Decoder,
    features: Mapping[str, Any],
    utterances: Sequence[Utterance],
    longest_s: float = LONGEST_S,
) -> float:
    """Seconds of work per second of audio, features included, one utterance at a time.

    Args:
        model: on the CPU, in evaluation mode.
        decoder: the search.
        features: how the model's features are computed, from its bundle.
        utterances: at least one; the first three are recognised once before, without measuring.
        longest_s: utterances that are longer are recognised in pieces.

    Raises:
        KdrecipeError: there is no utterance.
    """
    if not utterances:
        raise KdrecipeError("there is no utterance to measure a search on")
    run = partial(recognise, model, decoder, features, longest_s=longest_s)
    with _one_thread():
        for utterance in utterances[:NUM_WARM_UP]:
            run(utterance.samples_S)
        start = time.perf_counter()
        for utterance in utterances:
            run(utterance.samples_S)
        seconds = time.perf_counter() - start
    return seconds / sum(u.duration_s for u in utterances)


def recognise(
    model: nn.Module,
    decoder: Decoder,
    features: Mapping[str, Any],
    samples_S: np.ndarray,
    sample_rate: int = SAMPLE_RATE,
    longest_s: float = LONGEST_S,
) -> Hypothesis:
    """Audio of any length, samples in [-1, 1].

    Args:
        model: as for :func:`search_rtf`, like the next two.
        decoder: the search.
        features: how they are computed.
        samples_S: one channel.
        sample_rate: in Hz, any.
        longest_s: audio that is longer is recognised in pieces.
    """
    import torch

    from kdrecipe.data.features import extract

    def recognise_one(part_S: np.ndarray, sample_rate: int) -> Hypothesis:
        features_TF = extract(resample(part_S, sample_rate), SAMPLE_RATE, features)
        with torch.no_grad():
            out = model(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
            return decoder.decode(model, out)[0]

    return recognise_long(recognise_one, [samples_S], sample_rate, longest_s)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
