"""Published figures beside measured ones: each is either measured, or said not to be, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from kdrecipe.recipe.sections import Claim
from kdrecipe.score.claims import beside, claimed_text, measured_text, same_test_set

SYSTEMS: list[dict[str, Any]] = [
    {
        "name": "teacher",
        "params": 1000,
        "size_mb": 4.0,
        "splits": {"test_clean": {"wer": {"mean": 0.058, "ci95": [0.055, 0.061]}}},
    },
    {
        "name": "student",
        "params": 250,
        "size_mb": None,
        "splits": {
            "test_clean": {"wer": {"mean": 0.0712, "ci95": [0.0681, 0.0744]}},
            "test_other": {"wer": {"mean": 0.2, "ci95": None}},
        },
    },
]


def one(**fields: Any) -> dict[str, Any]:
    claim = Claim.model_validate({"text": "so it is", **fields}).model_dump()
    [found] = beside([claim], SYSTEMS, "librispeech")
    return found


def test_a_rate_on_the_same_test_set() -> None:
    found = one(system="student", figure="wer", value=6.5, on="LibriSpeech test-clean")
    assert (found["measured"], found["ci95"], found["measured_on"]) == (
        7.12,
        [6.81, 7.44],
        "librispeech test_clean",
    )
    assert found["note"] == "measured higher than claimed"
    assert claimed_text(found) == "6.5 % WER on LibriSpeech test-clean"
    assert measured_text(found) == "7.12 % WER (6.81 to 7.44) on librispeech test_clean"
    assert one(system="student", figure="wer", value=8)["note"] == "measured lower than claimed"
    assert one(system="student", figure="wer", value=7.0)["note"] == "the claim lies within the interval"


def test_a_rate_on_another_test_set_is_not_judged() -> None:
    found = one(system="student", figure="wer", value=6.5, on="TED-LIUM test")
    assert found["measured"] == 7.12
    assert found["note"] == "measured on another test set than claimed: not to be compared"


def test_a_split_may_be_named() -> None:
    found = one(system="student", figure="wer", value=20, split="test_other")
    assert (found["measured"], found["note"]) == (20, "")
    assert measured_text(found) == "20.00 % WER on librispeech test_other"
    assert "not decoded" in one(system="teacher", figure="wer", value=20, split="test_other")["note"]


def test_ratios() -> None:
    found = one(system="student", figure="params_ratio", of="teacher", value=0.25)
    assert (found["measured"], found["note"]) == (0.25, "")
    assert claimed_text(found) == measured_text(found) == "0.25 of teacher's parameters"
    assert "size in MB" in one(system="student", figure="size_ratio", of="teacher", value=0.25)["note"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "nothing here measures it"),
        ({"figure": "wer", "value": 5}, "nothing here measures it"),
        ({"system": "tiny", "figure": "wer", "value": 5}, "there is no system tiny here"),
        (
            {"system": "student", "figure": "size_ratio", "of": "big", "value": 1},
            "there is no system big here",
        ),
        ({"system": "student", "figure": "wer", "value": 5, "split": "dev"}, "dev is not decoded here"),
    ],
)
def test_what_is_not_measured_says_why(fields: dict[str, Any], reason: str) -> None:
    found = one(**fields)
    assert found["note"] == f"not measured: {reason}"
    assert found["measured"] is None
    assert measured_text(found) == ""
    assert bool(claimed_text(found)) == ("value" in fields)


def test_test_sets_by_name() -> None:
    assert same_test_set("LibriSpeech test-clean", "librispeech", "test_clean")
    assert not same_test_set("LibriSpeech test-clean", "mini_librispeech", "test_clean")
    assert not same_test_set("LibriSpeech test-clean", "librispeech", "test_other")
    assert not same_test_set("LibriSpeech test-clean", "an4", "test")
