"""Tokens of another model: its byte-level BPE, trimmed to what a text uses."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.data.byte_bpe import Merges, byte_symbols, words
from kdrecipe.data.tokens import MODELS, RESERVED, SPECIALS, Tokenizer, model_file
from kdrecipe.errors import DataError, KdrecipeError, RecipeError
from kdrecipe.frames import frame_log_probs, keep_top, over_tokens
from kdrecipe.interfaces import SOS_EOS_ID, UNK_ID, Posteriors
from kdrecipe.model.bundle import TOKEN_MODELS
from kdrecipe.text import clean

WRITTEN = (
    "it's the river, and he'd seen the red rivers of SIL in 1850; the café über 谢谢 the then there ever"
)
TEXTS = ["the river and the café", "it's there, 1850", "谢谢"]


@cache
def learnt(text: str, num_merges: int = 150) -> dict:
    """A ``tokenizer.json`` of the kind that GPT-2 and Whisper have, learnt from ``text``."""
    merges, vocab = [], {symbol: i for i, symbol in enumerate(byte_symbols())}
    parts = [[byte_symbols()[byte] for byte in word.encode()] for word in words(clean(text))]
    while len(merges) < num_merges and (pairs := Counter(pair for part in parts for pair in pairwise(part))):
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append([a, b])
        vocab[a + b] = len(vocab)
        for part in parts:
            at = 0
            while at < len(part) - 1:
                if part[at : at + 2] == [a, b]:
                    part[at : at + 2] = [a + b]
                at += 1
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    options = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "normalizer": None},
        "added_tokens": [{"id": len(vocab), "content": "<|endoftext|>", **end}],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", **options, "vocab": vocab, "merges": merges},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "tokenizer.json"
    path.write_text(json.dumps(learnt(WRITTEN)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(teacher, tmp_path_factory):
    return Tokenizer.trimmed(teacher, TEXTS, tmp_path_factory.mktemp("tokens"))


def test_the_list_is_specials_what_is_seen_and_all_bytes(tokenizer, teacher):
    assert tuple(tokenizer.pieces[:3]) == SPECIALS
    assert len(set(tokenizer.pieces)) == len(tokenizer)
    assert tokenizer.pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]  # as sherpa-onnx wants it
    assert {"▁the", "▁river", "▁café"} <= set(tokenizer.pieces)
    vocab = json.loads(teacher.read_text())["model"]["vocab"]
    assert "Ġrivers" in vocab
    assert "▁rivers" not in tokenizer.pieces
    assert 259 < len(tokenizer) < len(vocab)
    assert not any(
        len(piece.split()) != 1 for piece in tokenizer.pieces
    )  # a line of tokens.txt has two words


def test_each_token_has_the_teachers_id(tokenizer, teacher):
    read = json.loads(teacher.read_text())
    origin = tokenizer.model.origin
    assert len(origin) == len(tokenizer)
    assert origin[:3] == [None, read["added_tokens"][0]["id"], None]
    assert origin[SOS_EOS_ID] == read["added_tokens"][0]["id"]
    assert origin[tokenizer.pieces.index("▁river")] == read["model"]["vocab"]["Ġriver"]
    assert len(set(origin[3:])) == len(origin) - 3


def test_texts_are_encoded_as_the_teacher_encodes_them(tokenizer, teacher):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(teacher))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        whole = theirs.encode(" " + text, add_special_tokens=False).ids
        listed = [i for i in whole if i in tokenizer.model.origin]
        if listed == whole:  # no half letters
            assert [tokenizer.model.origin[i] for i in ids] == whole, text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB é'sStTrevLlmd  1²Ⅷ½_-.,!?ßya谢😀\u0301’the"), max_size=20))
def test_the_whole_tokeniser_is_the_teachers(text):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    read = learnt(WRITTEN)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(read))
    merges, text = Merges(read["model"]["merges"]), " " + clean(text)
    mine = [read["model"]["vocab"][symbol] for word in words(text) for symbol in merges.symbols(word)]
    assert mine == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20) | st.text(st.sampled_from("ther ivn'sSIL谢é<blk>\u2581"), max_size=20))
def test_nothing_is_unknown_and_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, SOS_EOS_ID, UNK_ID} & set(ids)
    assert tokenizer.decode(ids) == clean(text.encode("utf-8", "replace").decode())


def test_blanks_and_marks_are_not_text(tokenizer):
    ids = tokenizer.encode("the river")
    assert tokenizer.decode([0, *ids, 0, 1]) == "the river"
    assert tokenizer.decode([*ids, UNK_ID]) == "the river<unk>"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


def test_half_a_letter_and_reserved_names_are_spelled_in_bytes(teacher, tmp_path):
    tokenizer = Tokenizer.trimmed(teacher, ["SIL of SIL", "谢"], tmp_path)
    assert not RESERVED & set(tokenizer.pieces[3:])
    assert tokenizer.decode(tokenizer.encode("xSIL 谢")) == "xSIL 谢"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert model_file(tmp_path) == tmp_path / "bpe.json"
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.pieces == tokenizer.pieces
        assert other.vocab_id == tokenizer.vocab_id
        assert other.model.origin == tokenizer.model.origin
        assert other.encode("the unseen river") == tokenizer.encode("the unseen river")
    assert tuple(kind.file for kind in MODELS) == TOKEN_MODELS


@pytest.mark.parametrize("content", [b"garbage", b"{}", b"[]", b'{"symbols": []}'])
def test_a_damaged_file_is_named(tokenizer, tmp_path, content):
    tokenizer.save(tmp_path)
    (tmp_path / "bpe.json").write_bytes(content)
    with pytest.raises(KdrecipeError, match=r"bpe\.json: not a byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_other_kinds_of_tokens_are_refused(teacher, tmp_path):
    with pytest.raises(RecipeError, match=r"no\.json: there is no such file"):
        Tokenizer.trimmed(tmp_path / "no.json", TEXTS, tmp_path)
    read = json.loads(teacher.read_text())
    for change in (
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        {"normalizer": {"type": "NFKC"}},
    ):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**read, **change}))
        with pytest.raises(RecipeError, match=r"tokenizer\.json: no tokeniser by byte-level BPE"):
            Tokenizer.trimmed(path, TEXTS, tmp_path)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.trimmed(teacher, ["", " "], tmp_path)


def test_a_teachers_posteriors_over_trimmed_tokens_keep_their_mass():
    torch.manual_seed(0)
    logits_BTV, lens_B = torch.randn(2, 3, 7), torch.tensor([3, 2])
    whole = Posteriors(logits_BTV.log_softmax(-1), lens_B)
    found = over_tokens(whole, [None, 6, None, 0, 2, 3])  # its tokens 1, 4 and 5 are gone
    assert found.indices_BTK[0, 0].tolist() == [1, 3, 4, 5]
    probs_BTV = logits_BTV.softmax(-1)
    assert torch.allclose(found.log_probs_BTK.exp(), probs_BTV[..., [6, 0, 2, 3]])
    assert torch.allclose(found.log_tail_BT.exp(), probs_BTV[..., [1, 4, 5]].sum(-1))
    student_BTV = torch.zeros(2, 3, 6).scatter(-1, found.indices_BTK, found.log_probs_BTK)
    student_BTV[..., [0, 2]] = (found.log_tail_BT - math.log(2))[..., None]
    teacher_NK, student_NK = frame_log_probs(student_BTV, lens_B, found)
    assert torch.allclose(teacher_NK, student_NK, atol=1e-5)
    top = keep_top(found, 2)
    assert torch.allclose(top.log_probs_BTK.exp().sum(-1) + top.log_tail_BT.exp(), torch.ones(2, 3))


def test_posteriors_of_another_teacher_are_refused():
    whole = Posteriors(torch.randn(1, 2, 7).log_softmax(-1), torch.tensor([2]))
    with pytest.raises(DataError, match="over 7 classes"):
        over_tokens(whole, [None, 7, None, 0])
    with pytest.raises(DataError, match="top_k afterwards"):
        over_tokens(keep_top(whole, 2), [None, 6, None, 0])
