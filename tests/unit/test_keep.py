"""Which hypotheses become labels."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrecipe.errors import DataError
from kdrecipe.score.keep import EMPTY, LOOP, Keep, Said, compression_ratio, loops, repetition

OFF = Keep(
    min_avg_log_prob=None,
    max_no_speech_prob=None,
    max_compression_ratio=None,
    max_repetition=None,
    chars_per_s=None,
)
GOOD = "he went down to the river and sat there until the evening"


def said(text: str, utterance: str = "u", **known: float | str) -> Said:
    return Said(utterance, text, **{"duration_s": max(len(text), 1) / 14, **known})  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [Keep(), OFF], ids=["defaults", "all off"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", EMPTY),
        ("... !", EMPTY),
        ("thank you " * 6, LOOP),
        ("I went and I went and I went and I went and I went and I went and then", LOOP),
        ("so he said haaaaaaaaa", LOOP),
        ("谢谢" * 6, LOOP),
        ("Thank you. Thank you, thank you. Thank you. thank you. Thank you.", LOOP),
    ],
)
def test_empty_and_looping_hypotheses_are_never_kept(keep, text, reason):
    assert keep.judge(said(text.strip()))[0] == reason


@pytest.mark.parametrize("text", ["the the the", "no no no", "so I so I so I", "go on go on go on"])
def test_short_loops_are_seen_where_compression_is_blind(text):
    assert compression_ratio(text) < 1.1
    assert Keep().judge(said(text)) == ["max_repetition"]
    assert OFF.judge(said(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "no no",
        "very very good",
        "let us draw lots let us draw lots cried they",
        "banana",
        "谢谢",
        "hmm",
    ],
)
def test_what_people_say_is_kept(text):
    assert Keep().judge(said(text)) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one", 0),
        ("a a b b", 1 / 2),
        ("the the the", 2 / 3),
        ("x so I So, i so i y", 4 / 8),
        ("a b a", 0),
        ("so it so", 0),
        ("哈哈哈", 2 / 3),
    ],
)
def test_repetition_is_the_share_that_is_said_again(text, share):
    assert repetition(text) == pytest.approx(share)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.integers(2, 9))
def test_a_unit_said_n_times_is_repeated_n_minus_1_times(unit, n):
    text = " ".join(unit * n)
    assert repetition(text) >= (n - 1) / n - 1e-9
    assert n < 6 or loops(text)


def test_long_texts_are_judged_in_time():
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "eta", "zeta"], k=3000)
    began = time.process_time()
    assert not loops(" ".join(words))
    assert repetition(" ".join(words)) < 0.5
    assert time.process_time() - began < 2


BOUNDS = [
    ({"min_avg_log_prob": -0.5}, {"avg_log_prob": -0.6}, {"avg_log_prob": -0.5}),
    ({"min_avg_log_prob": -0.5}, {"avg_log_prob": float("nan")}, {"avg_log_prob": 0.0}),
    ({"max_no_speech_prob": 0.6}, {"no_speech_prob": 0.7}, {"no_speech_prob": 0.6}),
    ({"chars_per_s": [5, 20]}, {"duration_s": 1}, {"duration_s": 4}),
    ({"chars_per_s": [5, 20]}, {"duration_s": 10}, {"duration_s": 4}),
    ({"max_wer": 0.1}, {"transcript": GOOD + " it was late"}, {"transcript": GOOD + " it"}),
    ({"max_wer": 9}, {"transcript": ""}, {"transcript": GOOD}),
    ({"max_cer": 0.1}, {"transcript": GOOD + " it was"}, {"transcript": GOOD + " it"}),
]


@pytest.mark.parametrize(("option", "outside", "within"), BOUNDS)
def test_each_bound_drops_what_is_outside_and_what_is_not_known_passes(option, outside, within):
    keep = OFF.model_validate({**OFF.model_dump(), **option})
    assert keep.judge(said(GOOD, **outside)) == list(option)
    assert keep.judge(said(GOOD, **within)) == []
    assert keep.judge(said(GOOD)) == []
    assert OFF.judge(said(GOOD, **outside)) == []


def test_digits_that_are_left_may_drop_a_text():
    assert OFF.judge(said("x² is 5")) == []
    assert OFF.model_copy(update={"digits": False}).judge(said("x² is")) == ["digits"]


def test_compression_is_asked_of_long_texts_only():
    keep = OFF.model_copy(update={"max_compression_ratio": 1.2})
    assert keep.judge(said("thank you thank you thank you so")) == []
    text = "knit three knit two together knit four make one knit two together knit three"
    assert keep.judge(said(text)) == ["max_compression_ratio"]


@pytest.mark.parametrize(
    "options", [{"chars_per_s": [9, 1]}, {"min_avg_log_prob": 0.1}, {"max_repetition": 2}, {"max_were": 1}]
)
def test_bounds_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError):
        Keep.model_validate(options)


def test_the_table_counts_each_utterance_once_and_each_reason_too():
    found = Keep(max_wer=0.5).sort(
        [
            said(GOOD, "a", avg_log_prob=-0.1),
            said("", "b"),
            said("the the the", "c", avg_log_prob=-2.0),
            said(GOOD, "d", avg_log_prob=-1.5),
            said("the the the", "e"),
            said("unlike", "f", transcript="it is not the same"),
        ]
    )
    assert found.kept == ["a"]
    assert found.dropped["c"] == ["min_avg_log_prob", "max_repetition"]
    assert found.counts() == {
        "min_avg_log_prob": {"first": 2, "any": 2},
        "max_repetition": {"first": 1, "any": 2},
        "empty": {"first": 1, "any": 1},
        "max_wer": {"first": 1, "any": 1},
    }
    assert sum(count["first"] for count in found.counts().values()) == 5
    assert found.unknown == {"min_avg_log_prob": 3, "max_no_speech_prob": 6}
    lines = "\n".join(found.lines())
    assert "1 of 6 are kept as labels" in lines
    assert "max_repetition 0.5: 1 (1 more that count under another reason)" in lines
    assert "e: 'the the the'" in lines
    assert "min_avg_log_prob: the teacher does not say it of 3 of 6, which pass" in lines


def test_all_empty_is_an_error_of_its_own():
    with pytest.raises(DataError, match=r"all 3 hypotheses are empty(.|\n)*language"):
        Keep().sort([said("", u) for u in "abc"])


def test_all_filtered_away_says_by_what():
    with pytest.raises(
        DataError, match=r"none of 2 .*min_avg_log_prob -1: 2, max_repetition 0.5: 1(.|\n)*loosen min_avg"
    ):
        Keep().sort([said(GOOD, "a", avg_log_prob=-2.0), said("no no no", "b", avg_log_prob=-2.0)])
    with pytest.raises(DataError, match=r"none of 2 .*empty: 1, loop: 1"):
        OFF.sort([said("", "a"), said("na " * 9, "b")])
    with pytest.raises(DataError, match="no hypotheses"):
        Keep().sort([])
