"""Texts that a teacher wrote, in the form of the recipe's transcripts."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kdrecipe.errors import MissingExtra, RecipeError
from kdrecipe.spoken_numbers import digits_left
from kdrecipe.text_form import TextForm

needs_num2words = pytest.mark.skipif(
    importlib.util.find_spec("num2words") is None, reason="num2words: pip install 'kdrecipe[numbers]'"
)
LETTERS = TextForm(numbers="keep")

# ---------------------------------------------------------------- numbers

SPOKEN = {
    "1,000 men": "one thousand men",
    "12345": "twelve thousand three hundred and forty five",
    "1,234,567.89": "one million two hundred and thirty four thousand five hundred and sixty seven "
    "point eight nine",
    "3.5 or 3.05": "three point five or three point zero five",
    "the 1st, 22nd": "the first twenty second",
    "in 1850": "in eighteen fifty",
    "1905, 2000": "nineteen oh five two thousand",
    "the 1920s and '90s": "the nineteen twenties and nineties",
    "1914-1918": "nineteen fourteen nineteen eighteen",
    "$5": "five dollars",
    "$5.50": "five dollars fifty cents",
    "$3 million": "three million dollars",
    "£1": "one pound",
    "50%": "fifty percent",
    "at 3:30 p.m.": "at three thirty p m",
    "3:00, 3:05": "three o'clock three oh five",
    "555-1234": "five five five one two three four",
    "(555) 123-4567": "five five five one two three four five six seven",
    "agent 007": "agent zero zero seven",
    "24/7": "twenty four seven",
    "2 1/2 or 3¾": "two and a half or three and three quarters",
    "B2B, MP3": "b two b mp three",
    "x²": "x²",
    "٣": "three",
}


@needs_num2words
@pytest.mark.parametrize("written", SPOKEN)
def test_digits_become_the_words_that_are_said(written):
    assert TextForm().apply(written) == SPOKEN[written]


@needs_num2words
def test_every_language_has_its_own_numbers_and_signs():
    german = TextForm(language="de", case="keep")
    assert german.apply("1.000,5 km, 3,5 %, 1850, 5 €") == (
        "eintausend Komma fünf km drei Komma fünf Prozent achtzehnhundertfünfzig fünf Euro"
    )
    assert TextForm(language="fr").apply("le 1er, 21") == "le premier vingt et un"
    assert TextForm(language="tr").apply("5 $") == "beş"  # a currency that num2words can't say in Turkish


def test_numbers_may_stay_with_their_marks():
    assert LETTERS.apply("3.5 of 1,000, at 3:30.") == "3.5 of 1,000 at 3:30"


@needs_num2words
def test_an_unknown_language_is_refused_with_those_that_are_known():
    with pytest.raises(RecipeError, match=r"recipe.yaml:7.*'xx'(.|\n)*numbers: keep.*\bde\b"):
        TextForm(language="xx").check("recipe.yaml:7")
    with pytest.raises(RecipeError, match="'xx'"):
        TextForm(language="xx").apply("5")
    TextForm(language="xx", numbers="keep").check()
    TextForm(language="pt_BR").check()


def test_a_missing_num2words_names_the_command(monkeypatch):
    monkeypatch.setattr("kdrecipe.spoken_numbers.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'kdrecipe\[numbers\]'"):
        TextForm().check("recipe.yaml:7")
    assert TextForm().apply("No number.") == "no number"
    with pytest.raises(MissingExtra):
        TextForm().apply("5")


# ---------------------------------------------------------------- letters and marks


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("“Well,” he said — no…", "well he said no"),
        ("‘Don’t,’ it’s 'quoted'", "don't it's quoted"),
        ("well-known, non\u2011stop", "well known non stop"),
        ("[MUSIC] Yes. (applause) ♪ La ♪ <|en|>", "yes la"),
        ("[BLANK_AUDIO]", ""),
        ("snake_case a+b", "snake case a b"),
        ("हिन्दी।", "हिन्दी"),
    ],
)
def test_by_default_words_alone_are_left(written, said):
    assert LETTERS.apply(written) == said


def test_each_option_turns_its_part_off():
    text = "“It’s Jean-Luc (laughs), 'tis!”"
    assert LETTERS.apply(text) == "it's jean luc tis"
    for option, value, said in [
        ("case", "upper", "IT'S JEAN LUC TIS"),
        ("case", "keep", "It's Jean Luc tis"),
        ("punctuation", "keep", "“it's jean luc , 'tis!”"),
        ("hyphens", "keep", "it's jean-luc tis"),
        ("apostrophes", "remove", "its jean luc tis"),
        ("apostrophes", "keep", "it's jean luc 'tis"),
        ("brackets", "keep", "it's jean luc laughs tis"),
    ]:
        assert LETTERS.model_copy(update={option: value}).apply(text) == said, (option, value)


def test_case_goes_by_the_language():
    turkish = TextForm(language="tr", numbers="keep")
    assert turkish.apply("IŞIK İz") == "ışık iz"
    assert turkish.model_copy(update={"case": "upper"}).apply("ışık iz") == "IŞIK İZ"


def test_words_are_replaced_whatever_their_case_and_stop():
    form = LETTERS.model_copy(update={"replace": {"mr": "mister", "st": "saint"}})
    assert form.apply("Mr. Smith, MR Jones; mrs. St. x") == "mister smith mister jones mrs saint x"
    kept = form.model_copy(update={"punctuation": "keep", "case": "upper"})
    assert kept.apply("Mr. Smith, mr.") == "MISTER SMITH, MISTER."


@pytest.mark.parametrize("replace", [{"a": "a b"}, {"a": "B.", "b": "c"}, {"two words": "x"}, {"a": "1"}])
def test_a_replacement_that_would_not_end_is_refused(replace):
    with pytest.raises(ValidationError):
        TextForm(replace=replace)


FORMS = st.builds(
    TextForm,
    case=st.sampled_from(["lower", "upper", "keep"]),
    punctuation=st.sampled_from(["remove", "keep"]),
    hyphens=st.sampled_from(["space", "keep"]),
    apostrophes=st.sampled_from(["inner", "keep", "remove"]),
    numbers=st.sampled_from(["words", "keep"]),
    brackets=st.sampled_from(["remove", "keep"]),
    replace=st.sampled_from([{}, {"mr": "mister"}]),
    language=st.sampled_from(["en", "de", "fr", "tr", "lt"]),
)
WRITTEN = st.text(st.sampled_from("aMrsß ŉİıÉe\u0301-–'’.,:;/()[]<>♪$€%&½²0123459\u00a0٣"), max_size=24)


@needs_num2words
@settings(max_examples=400, deadline=None)
@given(FORMS, WRITTEN | st.text(max_size=24))
def test_applied_twice_it_changes_nothing_more(form, text):
    once = form.apply(text)
    assert form.apply(once) == once


@needs_num2words
@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("0123456789.,:/-$%s ath"), max_size=16))
def test_no_digit_is_left_in_english(text):
    said = TextForm().apply(text)
    assert not digits_left(said)
    assert said.replace(" ", "").replace("'", "").isalpha() or not said


# ---------------------------------------------------------------- the form of transcripts


@pytest.mark.parametrize(
    ("transcripts", "form"),
    [
        (["HE DIDN'T SAY", "MISTER SMITH"], {"case": "upper", "punctuation": "remove", "numbers": "words"}),
        (["he didn't say", "mr smith"], {"case": "lower", "apostrophes": "inner", "replace": {}}),
        (["take 'em", "dogs'"], {"apostrophes": "keep"}),
        (["no sign", "at all"], {"apostrophes": "remove", "hyphens": "space", "punctuation": "remove"}),
        (["He is 5.", "Well-known, no?"], {"case": "keep", "punctuation": "keep", "numbers": "keep"}),
        (["a well-known man"], {"hyphens": "keep", "punctuation": "remove"}),
        (["TEN PER CENT MISTER X"], {"replace": {"mr": "mister", "percent": "per cent"}}),
        (["谢谢"], {"case": "keep"}),
        ([], {"case": "lower", "punctuation": "remove", "numbers": "words", "replace": {}}),
    ],
)
def test_the_form_is_read_off_transcripts(transcripts, form):
    found = TextForm.like(transcripts).model_dump()
    assert {key: found[key] for key in form} == form
    assert "auto" not in found.values()


def test_transcripts_have_their_own_form():
    for transcripts in (["HE DIDN'T SAY"], ["He is 5.", "Well-known, no?"], ["take 'em"], ["谢谢"]):
        form = TextForm.like(transcripts)
        assert [form.apply(text) for text in transcripts] == transcripts


def test_what_the_recipe_says_is_not_read_off():
    form = TextForm(case="keep", replace={}).fitted(["MISTER SMITH"])
    assert (form.case, form.replace, form.punctuation) == ("keep", {}, "remove")


# ---------------------------------------------------------------- what is told


@needs_num2words
def test_changes_are_counted_by_kind_with_examples_of_each():
    texts = ["so it is", *[f"Plain {c}." for c in "abcdef"], "[MUSIC]", "in 5 days", "x² is"]
    found = TextForm().changes(texts)
    assert (found.texts, found.changed, found.emptied, found.digits) == (10, 8, 1, 1)
    assert found.kinds == {"case": 7, "punctuation": 6, "brackets": 1, "numbers": 1}
    said = "\n".join(found.lines())
    assert "8 of 10 are written otherwise now" in said
    assert "case 7: 'Plain a.' -> 'plain a.', 'Plain b.' -> 'plain b.'\n" in said
    assert "numbers 1: 'in 5 days' -> 'in five days'" in said
    assert "brackets 1: '[music]' -> ''" in said
    assert "nothing is left of 1" in said
    assert "1 still have digits" in said


@needs_num2words
def test_an_example_shows_the_words_that_it_is_about():
    text = "So on the way to the river he met 21 men who came from town"
    (example,) = TextForm().changes([text]).examples["numbers"]
    assert example == ("met 21 men", "met twenty-one men")


def test_nothing_changed_is_said_in_one_line():
    assert LETTERS.changes(["so", "it is"]).lines() == ["texts: all 2 are written like transcripts"]
