"""The plugin k2 with k2: its loss against ``rnnt``, its search against brute force."""

import importlib.util
import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from kdrecipe.data.ngram import estimate
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import BLANK_ID, ModelOutput, Targets
from kdrecipe.model.heads.rnnt import RnntHead, RnntLoss
from kdrecipe.testing.contracts import decoder_contract, loss_contract
from kdrecipe.testing.decode_checks import LetterTokens
from kdrecipe.testing.models import loss_setup, random_batch, random_output
from kdrecipe_plugins.decoders.ctc_greedy import CtcGreedy
from kdrecipe_plugins.k2.hlg import K2Hlg
from kdrecipe_plugins.k2.rnnt import K2Rnnt

if importlib.util.find_spec("k2") is None:
    pytest.skip("k2 is not installed: https://k2-fsa.github.io/k2", allow_module_level=True)

# ---------------------------------------------------------------- loss


def leaves(out, dtype):
    """A copy with floating-point tensors that gather gradients."""
    return out.map(lambda x: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x.clone())


def both(options, *, lens=(30, 22, 17), num_tokens=(11, 7, 3), dtype=torch.float32, labelled=(1, 1, 1)):
    """Result and gradients of ``rnnt`` and of ``k2_rnnt`` under the same options, on the same output."""
    batch = random_batch([4 * n for n in lens], num_tokens=num_tokens, seed=1)
    batch.labelled_B = torch.tensor(labelled, dtype=torch.bool)
    out = random_output(lens, batch=batch, seed=2)
    for cls in (RnntLoss, K2Rnnt):
        student = leaves(out, dtype)
        result = cls(cls.Config(**options), loss_setup())(student, Targets(), batch)
        result.total.backward()
        lattice = student.lattices["rnnt"]
        sides = (lattice.am_BTV, lattice.lm_BPV, lattice.encoder_BTJ, lattice.predictor_BPJ)
        yield result, [torch.zeros_like(x) if x.grad is None else x.grad for x in sides]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"full": True},
        {"range": 40},
        {"range": 5},
        {"range": 2},
        {"range": 3, "lm_scale": 0.0, "simple_scale": 1.5},
        {"simple_scale": 0.0},
    ],
    ids=str,
)
def test_k2_rnnt_has_the_value_and_the_gradient_of_rnnt(options, dtype):
    (want, wanted), (got, gradients) = both(options, dtype=dtype)
    relative = 1e-5 if dtype == torch.float32 else 1e-9
    assert float(got.total.detach()) == pytest.approx(float(want.total.detach()), rel=relative)
    assert int(got.count) == int(want.count) == 21
    for name in want.metrics:
        assert float(got.metrics[name]) == pytest.approx(float(want.metrics[name]), rel=relative)
    for a, b in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=10 * relative, atol=10 * relative)


def test_unlabelled_and_empty_utterances_are_left_out():
    (want, wanted), (got, gradients) = both(
        {}, lens=(30, 22, 17, 20), num_tokens=(11, 7, 0, 5), labelled=(1, 0, 1, 1)
    )
    assert float(got.total.detach()) == pytest.approx(float(want.total.detach()), rel=1e-5)
    assert int(got.count) == int(want.count) == 16
    for a, b in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        assert float(b[1:3].abs().max()) < 1e-12, "k2 has 1e-20 in place of a scale of 0"


def test_a_text_too_long_for_the_range_is_given_more(capfd):
    (want, _), (got, _) = both({"range": 2}, lens=(4, 9), num_tokens=(11, 3), labelled=(1, 1))
    assert float(got.total.detach()) == pytest.approx(float(want.total.detach()), rel=1e-5)
    assert capfd.readouterr().out == "", "k2 has nothing to warn of"


def test_a_real_head_under_bf16_autocast_learns_as_with_rnnt():
    torch.manual_seed(0)
    batch = random_batch((80, 60), num_tokens=(6, 4))
    hidden_BTD, lens_B = torch.randn(2, 20, 12), torch.tensor([20, 15])
    head = RnntHead(RnntHead.Config(predictor_dim=16, joiner_dim=16, dropout=0.0), 12, 6)
    totals, gradients = [], []
    for cls in (RnntLoss, K2Rnnt):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = ModelOutput(hidden_BTD, lens_B, lattices={"rnnt": head(hidden_BTD, lens_B, batch)})
            total = cls(cls.Config(range=3))(out, Targets(), batch).total
        assert total.dtype == torch.float32
        total.backward()
        totals.append(float(total.detach()))
        gradients.append([p.grad for p in head.parameters()])
    assert totals[1] == pytest.approx(totals[0], rel=1e-3)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05 * float(a.abs().max()))


@pytest.mark.parametrize(
    "check",
    [
        *loss_contract(K2Rnnt, {"range": 2}).bound(),
        *loss_contract(K2Rnnt, {"full": True}).bound(),
        *decoder_contract(K2Hlg).bound(),
    ],
    ids=lambda check: f"{check.contract.case.cls.__name__}-{check.check_id}",
)
def test_contract(check):
    check()


# ---------------------------------------------------------------- search

WIDE = {"search_beam": 1000.0, "output_beam": 1000.0, "min_active": 9_999}
WORDS = ("a", "ab", "abc", "b", "ca")  # beginnings of each other, and texts with several readings


def language_model(directory, sentences, order=2, vocabulary=()):
    """An n-gram over words, and what a decoder is given of it."""
    ngram = estimate([s.split() for s in sentences], order, vocabulary)
    ngram.write_arpa(directory / "words.arpa")
    return ngram, SimpleNamespace(path=directory / "tokens.arpa")


def decode(decoder, logits_BTV, lens_B=None):
    lens_B = torch.tensor([logits_BTV.shape[1]] * len(logits_BTV)) if lens_B is None else lens_B
    return decoder.decode(torch.nn.Identity(), ModelOutput(logits_BTV, lens_B, {"ctc": logits_BTV}))


@cache
def readings(text):
    """All sequences of words that spell ``text``."""
    if not text:
        return [()]
    return [(w, *rest) for w in WORDS if text.startswith(w) for rest in readings(text[len(w) :])]


def brute_force(log_probs_TV, ngram, lm_weight):
    """The best score of any frame path with any reading, and that reading."""
    tokens = LetterTokens()
    paths = {}
    for path in itertools.product((BLANK_ID, 3, 4, 5), repeat=len(log_probs_TV)):
        text = tokens.decode([k for k, _ in itertools.groupby(path) if k != BLANK_ID])
        score = sum(float(log_probs_TV[t, v]) for t, v in enumerate(path))
        paths[text] = max(score, paths.get(text, score))
    scored = [
        (score + lm_weight * float(ngram.log_probs([words]).sum()), " ".join(words))
        for text, score in paths.items()
        for words in readings(text)
    ]
    return max(scored)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lm_weight", [0.3, 1.0])
def test_the_best_path_is_that_of_brute_force(tmp_path, seed, lm_weight):
    sentences = ["a b", "ab ca", "abc a", "ca b ab", "a ab", "ca"]
    ngram, lm = language_model(tmp_path, sentences)
    decoder = K2Hlg(K2Hlg.Config(lm_weight=lm_weight, **WIDE), LetterTokens(), 0.04, lm)
    logits_TV = 3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
    (found,) = decode(decoder, logits_TV[None])
    score, text = brute_force(logits_TV.log_softmax(-1), ngram, lm_weight)
    assert found.text == text
    assert found.score == pytest.approx(score, abs=1e-3)
    assert LetterTokens().decode(found.tokens) == text.replace(" ", "")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_sentence_of_a_grammar_is_read_in_the_tokens_of_a_real_tokenizer(tmp_path, order):
    grammar = (("turn", "switch"), ("the", "a", "all"), ("light", "lights", "radio"), ("on", "off", "one"))
    sentences = [" ".join(words) for words in itertools.product(*grammar)]
    tokens = Tokenizer.train(sentences, "bpe", 40, tmp_path)
    _, lm = language_model(tmp_path, sentences, order)
    decoder = K2Hlg(K2Hlg.Config(), tokens, 0.04, lm)
    paths = [[x for token in tokens.encode(text) for x in (0, token, token)] for text in sentences]
    lens_B = torch.tensor([len(path) for path in paths])
    logits_BTV = torch.zeros(len(paths), int(lens_B.max()), len(tokens))
    for row, path in enumerate(paths):
        logits_BTV[row, torch.arange(len(path)), torch.tensor(path)] = 30.0
    found = decode(decoder, logits_BTV, lens_B)
    assert [h.text for h in found] == sentences
    for hypothesis, text in zip(found, sentences, strict=True):
        assert hypothesis.tokens == tokens.encode(text)
        assert tokens.decode(hypothesis.tokens) == text
        expected = [0.04 * (3 * place + 1) for place in range(len(hypothesis.tokens))]
        assert hypothesis.times_s == pytest.approx(expected)


def test_the_language_model_tips_the_scale(tmp_path):
    _, lm = language_model(tmp_path, ["a b", "a b", "a b", "b a"])
    logits_TV = torch.tensor([[0.0, 0, 0, 9, 0, 0], [9.0, 0, 0, 0, 0, 0], [0.0, 0, 0, 5.2, 5, 0]])
    texts = [
        decode(K2Hlg(K2Hlg.Config(lm_weight=weight), LetterTokens(), 0.04, lm), logits_TV[None])[0].text
        for weight in (0.01, 1.0)
    ]
    assert texts == ["a a", "a b"]


def test_only_words_of_the_n_gram_occur_and_only_those_that_can_be_spelt(tmp_path):
    class Tokens(LetterTokens):
        def encode(self, text):
            return [self.pieces.index(c) if c in self.pieces else 2 for c in text]

    _, lm = language_model(tmp_path, ["ab ca", "ü ab", "ca ü ü"])
    decoder = K2Hlg(K2Hlg.Config(), Tokens(), 0.04, lm)
    logits_BTV = 3 * torch.randn(20, 9, 6, generator=torch.Generator().manual_seed(0))
    found = decode(decoder, logits_BTV)
    assert {word for h in found for word in h.text.split()} == {"ab", "ca"}
    _, lm = language_model(tmp_path, ["ü ö"])
    with pytest.raises(DataError, match=r"words\.arpa: none of the n-gram's words can be spelt"):
        K2Hlg(K2Hlg.Config(), Tokens(), 0.04, lm)


def test_words_that_are_spelt_alike_are_told_apart_by_the_language_model(tmp_path):
    class Tokens(LetterTokens):
        def encode(self, text):
            return super().encode(text.lower())

    _, lm = language_model(tmp_path, ["a B", "a B", "b A"])
    logits_TV = torch.full((3, 6), -20.0)
    logits_TV[torch.arange(3), torch.tensor([3, 0, 4])] = 20.0
    (found,) = decode(K2Hlg(K2Hlg.Config(), Tokens(), 0.04, lm), logits_TV[None])
    assert found.text == "a B"


def test_utterances_without_frames_or_without_a_path_are_empty(tmp_path):
    _, lm = language_model(tmp_path, ["abc abc"])
    decoder = K2Hlg(K2Hlg.Config(search_beam=3.0, min_active=0), LetterTokens(), 0.04, lm)
    logits_BTV = torch.full((3, 4, 6), -40.0)
    logits_BTV[0, :, 3], logits_BTV[1, :, 4], logits_BTV[2, :, 0] = 40.0, 40.0, 40.0
    no_path, no_frames, silence = decode(decoder, logits_BTV, torch.tensor([4, 0, 4]))
    assert (no_path.text, no_path.tokens, no_path.score) == ("", [], None)
    assert (no_frames.text, no_frames.tokens, no_frames.score) == ("", [], 0.0)
    assert (silence.text, silence.tokens) == ("", [])
    assert silence.score is not None
    assert decode(decoder, logits_BTV[:1], torch.tensor([0]))[0].text == ""


def test_without_a_language_model_it_is_greedy_search():
    logits_BTV = 3 * torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(0))
    lens_B = torch.tensor([12, 5, 0, 9])
    want = decode(CtcGreedy(CtcGreedy.Config(), LetterTokens(), 0.04), logits_BTV, lens_B)
    got = decode(K2Hlg(K2Hlg.Config(lm_weight=0.0), LetterTokens(), 0.04), logits_BTV, lens_B)
    for a, b in zip(want, got, strict=True):
        assert (b.text, b.tokens, b.times_s) == (a.text, a.tokens, pytest.approx(a.times_s))
        assert b.score == pytest.approx(a.score, abs=1e-4)


def test_options_that_k2_would_die_of_are_refused():
    for wrong in ({"search_beam": 0.0}, {"output_beam": -1.0}, {"min_active": 50, "max_active": 50}):
        with pytest.raises(ValidationError):
            K2Hlg.Config(**wrong)


def test_a_weight_without_a_language_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"k2_hlg needs a language model\n.*lm: {name: ngram}"):
        K2Hlg(K2Hlg.Config(), LetterTokens(), 0.04)
    with pytest.raises(RecipeError, match="k2_hlg needs an n-gram over words"):
        K2Hlg(K2Hlg.Config(), LetterTokens(), 0.04, object())
    with pytest.raises(DataError, match=r"words\.arpa: no such n-gram"):
        K2Hlg(K2Hlg.Config(), LetterTokens(), 0.04, SimpleNamespace(path=tmp_path / "tokens.arpa"))
