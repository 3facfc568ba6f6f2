"""Tokens: ids, round trips, determinism, sizes that do not suit the text."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from kdrecipe.data.tokens import SPECIALS, Tokenizer
from kdrecipe.errors import DataError, KdrecipeError, RecipeError
from kdrecipe.interfaces import UNK_ID
from kdrecipe.testing.corpus import WORDS

TEXTS = [f"{a} {b}" for a in WORDS.split() for b in WORDS.split()[:5]]


@pytest.fixture(params=[("bpe", 40), ("unigram", 32), ("char", None)], ids=lambda p: p[0])
def tokenizer(request, tmp_path):
    kind, size = request.param
    return Tokenizer.train(TEXTS, kind, size, tmp_path / "tokens")


def test_special_tokens_come_first_and_the_list_is_the_models(tokenizer, tmp_path):
    lines = (tmp_path / "tokens" / "tokens.txt").read_text().splitlines()
    assert tuple(line.split()[0] for line in lines[:3]) == SPECIALS
    assert [int(line.split()[1]) for line in lines] == list(range(len(tokenizer)))
    assert not any(piece.startswith("<0x") for piece in tokenizer.pieces)  # no bytes


def test_text_survives_the_round_trip(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert min(ids) > UNK_ID
        assert tokenizer.decode(ids) == text


def test_blanks_and_marks_are_not_text(tokenizer):
    ids = tokenizer.encode("RED SUN")
    assert tokenizer.decode([0, *ids, 0, 1]) == "RED SUN"
    assert not {0, 1} & set(tokenizer.encode("RED <blk> SUN <sos/eos>"))


def test_unknown_characters_are_unk(tokenizer):
    assert UNK_ID in tokenizer.encode("RED 7 ü")
    assert "<unk>" in tokenizer.decode(tokenizer.encode("RED ü SUN"))


def test_loading_and_pickling_change_nothing(tokenizer, tmp_path):
    again = Tokenizer.load(tmp_path / "tokens")
    third = pickle.loads(pickle.dumps(again))
    for other in (again, third):
        assert other.vocab_id == tokenizer.vocab_id
        assert [other.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


def test_char_tokens_are_the_characters(tmp_path):
    tokenizer = Tokenizer.train(["AB BA", "CA"], "char", None, tmp_path)
    assert sorted(tokenizer.pieces[3:]) == ["A", "B", "C", "▁"]
    few = Tokenizer.train(["AB BA", "CA"], "char", 5, tmp_path)
    assert len(few) == 5


def test_training_is_deterministic_across_processes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdrecipe.data.tokens import Tokenizer;"
        "Tokenizer.train(sys.argv[2:], 'bpe', 40, Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name, *TEXTS], check=True)
    for file in ("spm.model", "tokens.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_many_tokens_for_the_text_say_how_many_there_can_be(kind, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Tokenizer.train(TEXTS, kind, 5000, tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == "tokens.vocab_size"
    highest = int(problem.remedy.split("set vocab_size to ")[1].split()[0])
    assert len(Tokenizer.train(TEXTS, kind, highest, tmp_path)) == highest  # the remedy works


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_fewer_tokens_than_characters_are_refused(kind, tmp_path):
    with pytest.raises(RecipeError, match="too few"):
        Tokenizer.train(TEXTS, kind, 8, tmp_path)


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train(["", "  "], "char", None, tmp_path)


def test_missing_damaged_or_mixed_up_files_are_named(tokenizer, tmp_path):
    directory = tmp_path / "tokens"
    (directory / "tokens.txt").write_text("other 0\n")
    with pytest.raises(KdrecipeError, match="does not list"):
        Tokenizer.load(directory)
    (directory / "spm.model").write_bytes(b"garbage")
    with pytest.raises(KdrecipeError, match="not a SentencePiece model"):
        Tokenizer.load(directory)
    (directory / "spm.model").unlink()
    with pytest.raises(KdrecipeError, match="missing file"):
        Tokenizer.load(directory)
