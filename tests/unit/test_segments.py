"""Long audio is cut in its pauses, whatever blocks it comes in, and put together again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdrecipe.cli.model_commands import transcribe
from kdrecipe.corpus.audio import open_audio, read_audio, recognise_long
from kdrecipe.corpus.segments import LONGEST_S, joined, segments
from kdrecipe.errors import DataError
from kdrecipe.interfaces import Hypothesis, Runner
from kdrecipe.recipe.sections import Decode

RATE = 16000


def speech(*parts_s: float, pause_level: float = 0.001) -> np.ndarray:
    """Noise of these durations, loud and all but silent in turn."""
    rng = np.random.default_rng(0)
    levels = [0.1 if i % 2 == 0 else pause_level for i in range(len(parts_s))]
    parts = [level * rng.standard_normal(round(s * RATE)) for level, s in zip(levels, parts_s, strict=True)]
    return np.concatenate(parts).astype(np.float32)


def starts(samples_S: np.ndarray, longest_s: float = LONGEST_S) -> list[float]:
    return [start_s for start_s, _ in segments([samples_S], RATE, longest_s)]


def test_there_is_one_longest_piece_unless_someone_says_otherwise() -> None:
    (option,) = [p for p in transcribe.params if p.name == "longest_s"]
    annotated = Runner.transcribe.__kwdefaults__["longest_s"]
    assert option.default == annotated == Decode().longest_s == LONGEST_S


@pytest.mark.parametrize("duration_s", [0.025, 1.0, 30.0])
def test_what_is_not_too_long_stays_whole(duration_s: float) -> None:
    samples_S = speech(duration_s)
    ((start_s, part_S),) = segments([samples_S], RATE)
    assert start_s == 0
    np.testing.assert_array_equal(part_S, samples_S)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 100, 399])
def test_next_to_nothing_is_no_segment(num_samples: int) -> None:
    assert list(segments([np.ones(num_samples, dtype=np.float32)], RATE)) == []


def test_cuts_are_in_pauses() -> None:
    samples_S = speech(17, 0.4, 8, 0.4, 20, 0.6, 9)
    second, third = starts(samples_S)[1:]
    assert min(abs(second - 17.2), abs(second - 25.6)) < 0.1
    assert third == pytest.approx(46.1, abs=0.2)


@pytest.mark.parametrize("at_level", [0.0, 0.001])
def test_a_long_pause_is_taken_before_a_short_one(at_level: float) -> None:
    samples_S = speech(18, 0.6, 6, 0.1, 10, pause_level=at_level)
    assert 18.2 <= starts(samples_S)[1] <= 18.4
    after_S = speech(18, 0.1, 6, 0.6, 10, pause_level=at_level)
    assert 24.3 <= starts(after_S)[1] <= 24.5


def test_a_short_pause_is_cut_in_its_middle() -> None:
    assert starts(speech(20.003, 0.12, 14))[1] == pytest.approx(20.063, abs=0.02)


def test_an_offset_of_the_microphone_is_no_sound() -> None:
    samples_S = speech(20, 0.4, 14)
    assert starts(samples_S + 0.3) == pytest.approx(starts(samples_S), abs=0.05)


def test_audio_without_pauses_is_cut_all_the_same() -> None:
    for samples_S in (speech(100), np.zeros(100 * RATE, dtype=np.float32)):
        ends = [*starts(samples_S), 100]
        assert all(14.9 <= b - a <= 30 for a, b in pairwise(ends[:-1]))


@pytest.mark.parametrize("block", [50, 999, 16000, 10**9])
def test_pieces_do_not_depend_on_blocks(block: int) -> None:
    samples_S = speech(*[0.7, 0.3] * 4)
    blocks = [samples_S[i : i + block] for i in range(0, len(samples_S), block)]
    found, expected = list(segments(blocks, RATE, 1.5)), list(segments([samples_S], RATE, 1.5))
    assert [start_s for start_s, _ in found] == [start_s for start_s, _ in expected]
    assert len(found) >= 3
    np.testing.assert_array_equal(np.concatenate([part_S for _, part_S in found]), samples_S)


def test_results_are_joined_with_their_times() -> None:
    parts = [(0.0, "a b", [3, 4], [0.1, 0.5]), (2.0, "", [], []), (4.0, "c", [5], [0.25])]
    assert joined(parts) == ("a b c", [3, 4, 5], [0.1, 0.5, 4.25])
    assert joined([]) == ("", [], [])
    assert joined([(0.0, "你好", [], []), (1.0, "", [], []), (2.0, "世界", [], [])])[0] == "你好世界"
    assert joined([(0.0, "안녕", [], []), (1.0, "세계", [], [])])[0] == "안녕 세계"


def test_a_recogniser_hears_pieces_and_says_the_whole() -> None:
    heard: list[float] = []

    def recognise(samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        heard.append(len(samples_S) / sample_rate)
        return Hypothesis("x", [3], [0.5], -1.0)

    found = recognise_long(recognise, [speech(0.7, 0.3, 0.8)], RATE, 1.0)
    assert sum(heard) == pytest.approx(1.8)
    assert len(heard) == 2
    assert found == Hypothesis("x x", [3, 3], [0.5, heard[0] + 0.5], -2.0)
    assert recognise_long(recognise, [np.zeros(1)], RATE) == Hypothesis("", score=0.0)


def test_log_probabilities_are_averaged_over_the_tokens_of_all_pieces() -> None:
    long, short = Hypothesis("a b c", [3, 4, 5], avg_log_prob=-1.0), Hypothesis("d", [6], avg_log_prob=-3.0)
    pieces = iter([long, short])
    found = recognise_long(lambda samples_S, rate: next(pieces), [speech(0.7, 0.3, 0.8)], RATE, 1.0)
    assert (found.avg_log_prob, found.score) == (-1.5, None)
    silent = recognise_long(lambda samples_S, rate: Hypothesis("", avg_log_prob=None), [speech(0.7)], RATE)
    assert silent.avg_log_prob is None


# ---------------------------------------------------------------- files


def write(path: Path, *channels: np.ndarray, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, np.stack(channels, axis=1), RATE, subtype=subtype)
    return path


def test_files_are_read_block_by_block(tmp_path: Path) -> None:
    left_S, right_S = speech(25.0), speech(1.0, 24.0)
    path = write(tmp_path / "a.wav", left_S, right_S)
    sample_rate, blocks = open_audio(path)
    lengths = [len(block_S) for block_S in blocks]
    assert (sample_rate, lengths) == (RATE, [160000, 160000, 80000])
    np.testing.assert_allclose(read_audio(path)[0], (left_S + right_S) / 2, atol=1e-7)
    for channel, expected_S in enumerate((left_S, right_S)):
        np.testing.assert_array_equal(np.concatenate(list(open_audio(path, channel)[1])), expected_S)
    with pytest.raises(DataError, match=r"a\.wav: there is no channel 2, there are: 0, 1"):
        open_audio(path, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    samples_S = speech(13.0)
    samples_S[12 * RATE] = value
    with pytest.raises(DataError, match=r"a\.wav: there are samples that are no numbers.* at 12\.000 s"):
        read_audio(write(tmp_path / "a.wav", samples_S))


def test_channels_that_cancel_each_other_are_told(tmp_path: Path) -> None:
    samples_S = speech(1.0)
    path = write(tmp_path / "a.wav", samples_S, -samples_S)
    with pytest.raises(DataError, match=r"a\.wav: the channels cancel each other(.|\n)*--channel 0"):
        read_audio(path)
    np.testing.assert_array_equal(np.concatenate(list(open_audio(path, 1)[1])), -samples_S)
    silent_S = np.zeros(RATE, dtype=np.float32)
    assert not read_audio(write(tmp_path / "silent.wav", silent_S, silent_S))[0].any()
