"""What is done to test utterances: the words stay, and what is said to differ does."""

from __future__ import annotations

import numpy as np
import pytest

from kdrecipe.corpus.audio import Utterance
from kdrecipe.measure.conditions import CONDITIONS


def utterances(number=9):
    rng = np.random.default_rng(0)
    lens = rng.integers(8000, 60000, number)
    return [
        Utterance(f"u{i}", (0.1 * rng.standard_normal(n)).astype(np.float32), f"WORD{i} OF {i}")
        for i, n in enumerate(lens)
    ]


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_words_are_the_same_and_equal_input_gives_equal_output(name):
    clean = utterances()
    heard, again = (CONDITIONS[name].apply(clean) for _ in range(2))
    assert " ".join(u.text for u in heard) == " ".join(u.text for u in clean)
    assert len({u.id for u in heard}) == len(heard)
    for one, other in zip(heard, again, strict=True):
        np.testing.assert_array_equal(one.samples_S, other.samples_S)
        assert one.samples_S.dtype == np.float32


def test_the_first_condition_is_none():
    first, *_ = CONDITIONS
    assert first == "clean"
    assert CONDITIONS[first].apply(utterances()) is not None
    for one, other in zip(CONDITIONS[first].apply(utterances()), utterances(), strict=True):
        np.testing.assert_array_equal(one.samples_S, other.samples_S)


def test_silence_is_two_seconds_of_zeros_on_each_side():
    for clean, heard in zip(utterances(), CONDITIONS["silence"].apply(utterances()), strict=True):
        assert not heard.samples_S[:32000].any()
        assert not heard.samples_S[-32000:].any()
        np.testing.assert_array_equal(heard.samples_S[32000:-32000], clean.samples_S)


@pytest.mark.parametrize(("name", "limit_s"), [("joined_10s", 10.0), ("joined_30s", 30.0)])
def test_joined_utterances_last_so_long_and_lose_nothing(name, limit_s):
    rows = CONDITIONS[name].apply(utterances(30))
    longest_s = max(u.duration_s for u in utterances(30))
    assert all(limit_s <= u.duration_s < limit_s + longest_s for u in rows[:-1])
    assert sum(len(u.samples_S) for u in rows) == sum(len(u.samples_S) for u in utterances(30))


@pytest.mark.parametrize(("name", "db"), [("quieter", -20.0), ("louder", 20.0)])
def test_levels(name, db):
    for clean, heard in zip(utterances(), CONDITIONS[name].apply(utterances()), strict=True):
        np.testing.assert_allclose(heard.samples_S, clean.samples_S * 10 ** (db / 20), rtol=1e-5)


def test_noise_is_ten_decibels_below_the_speech_and_differs_between_utterances():
    differences = []
    for clean, heard in zip(utterances(), CONDITIONS["noise"].apply(utterances()), strict=True):
        noise = heard.samples_S - clean.samples_S
        ratio = np.mean(clean.samples_S.astype(float) ** 2) / np.mean(noise.astype(float) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.01)
        differences.append(noise[:1000] / np.std(noise))
    assert not np.allclose(differences[0], differences[6])  # the same kind of noise again
