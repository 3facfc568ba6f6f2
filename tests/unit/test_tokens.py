"""Tokens: ids, round trips, determinism, sizes that do not suit the text."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from kdrecipe.data.tokens import RESERVED, SPECIALS, Tokenizer, read_pieces
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


ODD = ["ＡＢＣ", "½ № …", "ﬁn", "և", "ŉ ²", "ABC 1 2 No fi ե ւ n ."]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_tokens_rewrite_no_character(kind, tmp_path):
    tokenizer = Tokenizer.train(ODD, kind, None if kind == "char" else 27, tmp_path)
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("space", ["\t", "\u0085", "\u2028", "\u3000", "\ufeff", "\u00a0"], ids=ascii)
def test_white_space_is_no_token_and_no_unknown(tokenizer, space, tmp_path):
    assert tokenizer.encode(f"RED{space}SUN{space}") == tokenizer.encode("RED SUN")
    Tokenizer.train([text.replace(" ", space) for text in TEXTS], "char", None, tmp_path / "odd")
    Tokenizer.train(TEXTS, "char", None, tmp_path / "plain")
    assert (tmp_path / "odd" / "tokens.txt").read_text() == (tmp_path / "plain" / "tokens.txt").read_text()


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


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a"] * 40, "every training transcript is 'a': it yields"),
        (
            ["a b", "b a"],
            "the training text has 2 different transcripts of 2 different words and 2 characters: it",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_poverty_of_the_text_is_said_before_the_size(texts, said, kind, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Tokenizer.train(texts, kind, 500, tmp_path)
    (problem,) = caught.value.problems
    assert problem.what.startswith(said)
    assert problem.what.endswith("not 500")
    assert problem.remedy.startswith("look at the transcripts")


# ---------------------------------------------------------------- names that runtimes reserve

FOSSILS = [f"{a} {b}" for a in ("RED", "BLUE") for b in ("FOSSIL", "BASIL", "TONSIL", "FOSSIL BASIL", "SIL")]


def test_a_reserved_name_is_no_piece(tmp_path):
    tokenizer = Tokenizer.train(FOSSILS, "bpe", 30, tmp_path)
    assert "<unused:SIL>" in tokenizer.pieces, "else this test shows nothing: take another size"
    assert not RESERVED & set(tokenizer.pieces[len(SPECIALS) :])
    unused = tokenizer.pieces.index("<unused:SIL>")
    for text in [*FOSSILS, "SIL", "SILSIL"]:
        ids = tokenizer.encode(text)
        assert unused not in ids
        assert tokenizer.decode(ids) == text
    assert "SIL " not in (tmp_path / "tokens.txt").read_text().replace(":SIL>", "")
    assert Tokenizer.load(tmp_path).pieces == tokenizer.pieces


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_names_in_texts_are_spelled_or_unknown(name, tmp_path):
    tokenizer = Tokenizer.train([f"{text} {name}" for text in FOSSILS], "bpe", 30, tmp_path)
    ids = tokenizer.encode(f"RED {name}")
    assert not {0, 1} & set(ids)
    assert not RESERVED & {tokenizer.pieces[i] for i in ids if i != UNK_ID}


@pytest.mark.parametrize("ids", [[2], [5, 2, 6], [2, 5]])
def test_an_unknown_character_is_spelled_as_the_tokens_are(tokenizer, ids):
    """A bundle says what a runtime says that joins the pieces."""
    joined = "".join(tokenizer.pieces[i] for i in ids).replace("▁", " ").strip()
    assert tokenizer.decode(ids) == joined


def test_a_list_of_tokens_is_read_line_by_line(tmp_path):
    """Of a bundle from elsewhere, whose tokens may hold anything."""
    pieces = [*SPECIALS, "▁", "\u2028", "a\u0085b", "\u3000", "\x1c"]
    path = tmp_path / "tokens.txt"
    path.write_bytes("".join(f"{piece} {i}\n" for i, piece in enumerate(pieces)).encode())
    assert read_pieces(path) == pieces


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
