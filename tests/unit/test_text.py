"""One rule for text: from the transcript to tokens, language models and scores."""

from __future__ import annotations

import json

import pytest

from kdrecipe.score.facts import text_facts
from kdrecipe.score.hypotheses import read_hypotheses
from kdrecipe.text import clean, control_characters, lines, odd_characters, read_lines, shown
from kdrecipe_plugins.metrics.cer import Cer
from kdrecipe_plugins.metrics.wer import TextOptions, Wer

ODD_SPACES = [*"\t\v\u0085\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\ufeff", "\r\n", " \t "]
KEPT = "ＡＢＣ ½ № … ﬁ և ŉ ² Ａ\u200cＢ"


@pytest.mark.parametrize("space", ODD_SPACES, ids=ascii)
def test_any_white_space_is_one_space(space):
    assert clean(f"{space}RED{space}{space}SUN{space}") == "RED SUN"
    for metric in (Wer(TextOptions()), Cer(TextOptions())):
        assert metric.errors(f"RED{space}SUN", "RED SUN")[0] == 0
        assert metric.errors("RED SUN", f"RED{space}SUN")[0] == 0


def test_letters_are_composed_and_otherwise_kept():
    assert clean("Cafe\u0301") == "Caf\u00e9"
    assert clean(KEPT) == KEPT
    assert clean(clean(" e\ufeff\u0301 ")) == clean(" e\ufeff\u0301 ")


def test_what_a_reader_can_not_see_is_found():
    assert control_characters("A\0B\x1b\x7f\x80\ud800 \t\n\u0085é") == [
        "\0",
        "\x1b",
        "\x7f",
        "\x80",
        "\ud800",
    ]
    assert odd_characters("A\tB\u00adC\u3000D\u200c\ufeff é") == ["\t", "\u00ad", "\u3000", "\ufeff"]
    assert shown("ü\u2028\0") == "ü (U+00FC), U+2028, U+0000"


def test_lines_end_at_newlines_only(tmp_path):
    text = "a\u2028b\u0085c\x1cd\re\n\nf"
    assert lines(text) == ["a\u2028b\u0085c\x1cd\re", "", "f"]
    assert lines(text + "\n") == lines(text)
    assert lines("") == []
    (tmp_path / "text").write_bytes(f"{text}\r\n".encode())
    assert read_lines(tmp_path / "text") == ["a\u2028b\u0085c\x1cd\re", "", "f\r"]


def test_hypotheses_are_read_whatever_their_texts_hold(tmp_path):
    rows = [
        {"id": "u1", "ref": "RED\u2028SUN", "hyp": "RED\u0085SUN\ufeff"},
        {"id": "u2", "ref": "é", "hyp": "e\u0301"},
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_hypotheses(path) == {"u1": ("RED SUN", "RED SUN"), "u2": ("é", "é")}


# ---------------------------------------------------------------- facts that change a score


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis", "errors"),
    [
        (None, "IŞIK", "ışık", 1),
        ("tr", "IŞIK", "ışık", 0),
        ("az", "İSTANBUL", "istanbul", 0),
        ("tr", "SINIR", "sinir", 1),  # border, nerve
        ("lt", "Ì", "i\u0307\u0300", 0),
        (None, "STAR", "star", 0),
    ],
)
def test_case_by_language(language, reference, hypothesis, errors):
    assert Wer(TextOptions(lowercase=True, language=language)).errors(reference, hypothesis) == (errors, 1)


def facts(references, hypotheses, **options):
    """Of one system and one metric."""
    refs, said = ({str(i): text for i, text in enumerate(texts)} for texts in (references, hypotheses))
    return text_facts(refs, {"kd": said}, {"wer": Wer(TextOptions(**options))}, "test")


def test_turkish_without_a_language_is_noted():
    (note,) = facts(["IŞIK"], ["ışık"], lowercase=True)
    assert "test: 1 texts have ı or İ" in note
    assert "language: tr" in note
    assert facts(["IŞIK"], ["ışık"], lowercase=True, language="tr") == []
    assert facts(["ışık"], ["ışık"]) == []


@pytest.mark.parametrize(
    ("references", "hypotheses", "expected"),
    [
        (["three", "red"], ["3", "red"], "no test reference has digits, what systems say has (kd in 1 of 2"),
        (["3", "red"], ["three", "red"], "1 of 2 test references have digits, what kd says has none"),
        (["RED"], ["red"], "test references have capitals, systems other letters (kd small letters)"),
        (["Red"], ["RED"], "test references have capitals and small letters, systems other"),
        (["...", "red"], ["red", "red"], "1 test reference is empty: whatever a system says there is an"),
    ],
)  # fmt: skip
def test_facts_that_change_a_score_are_noted(references, hypotheses, expected):
    (note,) = facts(references, hypotheses, remove_punctuation=True)
    assert note.startswith(expected)


def test_equal_sides_are_not_noted():
    assert facts(["RED 3"], ["RED 3"]) == []
    assert facts(["RED"], ["R<unk>"]) == []  # no small letters, an unknown one
    assert facts(["RED"], ["red"], lowercase=True) == []
    assert facts(["红", "三"], ["红", "三"]) == []
