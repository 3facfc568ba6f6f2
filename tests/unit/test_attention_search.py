"""Attention searches: against brute force over all texts, and against each other."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import BLANK_ID, SOS_EOS_ID, ModelOutput
from kdrecipe.model.heads.attention import AttentionHead
from kdrecipe.model.heads.ctc import CtcHead
from kdrecipe.testing.decode_checks import LetterTokens
from kdrecipe.testing.models import random_batch
from kdrecipe_plugins.decoders.attention_beam import AttentionBeam
from kdrecipe_plugins.decoders.attention_greedy import AttentionGreedy
from kdrecipe_plugins.decoders.ctc_prefix_scores import CtcPrefixScorer

SIZE, WIDTH = 5, 8  # <blk>, <sos/eos>, <unk>, a, b


class Recogniser(nn.Module):
    """Random heads, sharpened until they have opinions."""

    def __init__(self, seed: int, size: int = SIZE, ctc: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        heads = {"attention": AttentionHead(AttentionHead.Config(num_layers=2), WIDTH, size)}
        if ctc:
            heads["ctc"] = CtcHead(CtcHead.Config(), WIDTH, size)
        self.heads = nn.ModuleDict(heads)
        with torch.no_grad():
            for weight in self.parameters():
                weight *= 2.5
        self.double().eval()

    def output(self, lens: list[int], seed: int = 0) -> ModelOutput:
        hidden_BTD = torch.randn(
            len(lens), max(lens), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        lens_B = torch.tensor(lens)
        logits = {"ctc": self.heads["ctc"](hidden_BTD, lens_B).detach()} if "ctc" in self.heads else {}
        return ModelOutput(hidden_BTD, lens_B, logits)


class RandomLm:
    """Log-probabilities that depend on the whole history."""

    def start(self):
        return ()

    def score(self, state, token):
        return float(self._row(state)[token]), (*state, token)

    def end(self, state):
        return float(self._row(state)[SOS_EOS_ID])

    def _row(self, state):
        rng = np.random.default_rng([len(state), *state])
        logits = 2 * rng.standard_normal(SIZE)
        return logits - np.logaddexp.reduce(logits)


def attention_log_probs(model: Recogniser, out: ModelOutput, texts: list[tuple[int, ...]]) -> list[float]:
    """Of texts of one length, as in training: all tokens at once."""
    tokens_NU = torch.tensor(texts, dtype=torch.int64).view(len(texts), -1)
    lens_N = torch.full((len(texts),), tokens_NU.shape[1])
    batch = replace(random_batch([1] * len(texts)), tokens_BU=tokens_NU, token_lens_B=lens_N)
    with torch.no_grad():
        hidden = out.hidden_BTD.expand(len(texts), -1, -1)
        logits = model.heads["attention"](hidden, out.lens_B.expand(len(texts)), batch)
    wanted_NP1 = nn.functional.pad(tokens_NU, (0, 1), value=SOS_EOS_ID)[..., None]
    return logits.log_softmax(-1).gather(-1, wanted_NP1).sum((1, 2)).tolist()


def ctc_log_prob(log_probs_TV: np.ndarray, text: tuple[int, ...]) -> float:
    """By torch's own loss."""
    loss = nn.functional.ctc_loss(
        torch.from_numpy(log_probs_TV)[:, None],
        torch.tensor([text], dtype=torch.int64).view(1, -1),
        torch.tensor([len(log_probs_TV)]),
        torch.tensor([len(text)]),
        reduction="sum",
    )
    return -float(loss)


def lm_log_prob(lm: RandomLm, text: tuple[int, ...]) -> float:
    state, total = lm.start(), 0.0
    for token in text:
        score, state = lm.score(state, token)
        total += score
    return total + lm.end(state)


def best_text(model, out, config, lm) -> tuple[tuple[int, ...], float]:
    """The best of all texts with at most as many tokens as frames, by the definition of the score."""
    num_frames = int(out.lens_B[0])
    log_probs_TV = out.logits["ctc"][0].log_softmax(-1).numpy() if config.ctc_weight else None
    letters = [v for v in range(SIZE) if v not in (BLANK_ID, SOS_EOS_ID)]
    attention = {}
    for length in range(num_frames + 1):
        texts = list(itertools.product(letters, repeat=length))
        attention |= dict(zip(texts, attention_log_probs(model, out, texts), strict=True))

    def score(text):
        total = (1 - config.ctc_weight) * attention[text] + config.length_bonus * len(text)
        if log_probs_TV is not None:
            total += config.ctc_weight * ctc_log_prob(log_probs_TV, text)
        return total + (config.lm_weight * lm_log_prob(lm, text) if lm is not None else 0.0)

    scored = {text: score(text) for text in attention}
    best = max(scored, key=scored.get)
    return best, scored[best]


OPTIONS = [
    {"ctc_weight": 0.0},
    {"ctc_weight": 0.3},
    {"ctc_weight": 0.9},
    {"ctc_weight": 0.3, "lm_weight": 0.5},
    {"ctc_weight": 0.0, "lm_weight": 0.7, "length_bonus": 1.0},
    {"ctc_weight": 0.3, "length_bonus": 3.0},
    {"ctc_weight": 0.3, "length_bonus": -2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_texts(seed, options):
    model = Recogniser(seed)
    out = model.output([4], seed)
    config = AttentionBeam.Config(beam=1000, **options)
    lm = RandomLm() if config.lm_weight else None
    (found,) = AttentionBeam(config, LetterTokens(SIZE), 0.04, lm).decode(model, out)
    text, score = best_text(model, out, config, lm)
    assert tuple(found.tokens) == text
    assert found.score == pytest.approx(score, abs=1e-6)


def test_the_problems_are_not_trivial():
    """The brute force above must not always say the same, or an empty text."""
    found = set()
    for seed, options in itertools.product(range(3), OPTIONS):
        model = Recogniser(seed)
        config = AttentionBeam.Config(beam=1000, **options)
        decoder = AttentionBeam(config, LetterTokens(SIZE), 0.04, RandomLm())
        found.add(tuple(decoder.decode(model, model.output([4], seed))[0].tokens))
    assert len(found) >= 6
    assert {len(text) for text in found} >= {1, 2, 4}


def test_wider_beams_find_better_texts():
    totals = []
    for beam in (1, 4, 16, 64):
        decoder = AttentionBeam(AttentionBeam.Config(beam=beam), LetterTokens(8), 0.04)
        found = [decoder.decode(m, m.output([9])) for m in (Recogniser(seed, size=8) for seed in range(6))]
        totals.append(sum(hypothesis.score for (hypothesis,) in found))
    assert totals == sorted(totals)
    assert totals[0] < totals[2] - 1


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_of_one_without_ctc_is_greedy(seed):
    model = Recogniser(seed, size=8, ctc=False)
    out = model.output([9, 4, 7], seed)
    greedy = AttentionGreedy(AttentionGreedy.Config(), LetterTokens(8), 0.04).decode(model, out)
    beam = AttentionBeam(AttentionBeam.Config(beam=1, ctc_weight=0.0), LetterTokens(8), 0.04)
    found = beam.decode(model, out)
    assert [h.tokens for h in found] == [h.tokens for h in greedy]
    assert [h.tokens for h in greedy] == model.heads["attention"].greedy(out.hidden_BTD, out.lens_B)
    for ours, theirs, length in zip(found, greedy, out.lens_B.tolist(), strict=True):
        if len(ours.tokens) < length:  # not cut off
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)


def test_greedys_score_is_the_log_probability_of_its_text():
    model = Recogniser(0)
    out = model.output([12])
    (found,) = AttentionGreedy(AttentionGreedy.Config(), LetterTokens(SIZE), 0.04).decode(model, out)
    (expected,) = attention_log_probs(model, out, [tuple(found.tokens)])
    assert len(found.tokens) < 12
    assert found.score == pytest.approx(expected, abs=1e-5)


def test_the_longest_text_is_a_share_of_the_frames():
    model = Recogniser(0)
    out = model.output([8])
    config = AttentionBeam.Config(ctc_weight=0.0, length_bonus=50.0, max_len_ratio=0.5)
    (found,) = AttentionBeam(config, LetterTokens(SIZE), 0.04).decode(model, out)
    assert len(found.tokens) == 4


def test_times_come_from_the_alignment_of_ctc():
    model = Recogniser(1)
    out = model.output([9])
    with_ctc, without = (
        AttentionBeam(AttentionBeam.Config(ctc_weight=w, length_bonus=2.0), LetterTokens(SIZE), 0.04)
        for w in (0.3, 0.0)
    )
    (found,) = with_ctc.decode(model, out)
    assert len(found.times_s) == len(found.tokens) > 0
    assert without.decode(model, out)[0].times_s == []


def test_the_head_ctc_is_asked_where_its_logits_are_not_there():
    model = Recogniser(2)
    out = model.output([6, 5])
    decoder = AttentionBeam(AttentionBeam.Config(), LetterTokens(SIZE), 0.04)
    bare = ModelOutput(out.hidden_BTD, out.lens_B)
    assert decoder.decode(model, bare) == decoder.decode(model, out)


def test_ctc_weight_without_the_head_ctc_is_refused():
    model = Recogniser(0, ctc=False)
    decoder = AttentionBeam(AttentionBeam.Config(), LetterTokens(SIZE), 0.04)
    with pytest.raises(RecipeError, match="no head 'ctc'") as error:
        decoder.decode(model, model.output([5]))
    assert "ctc_weight: 0" in str(error.value)


def test_lm_weight_without_a_language_model_is_refused():
    with pytest.raises(RecipeError, match="no language model"):
        AttentionBeam(AttentionBeam.Config(lm_weight=0.5), LetterTokens(SIZE), 0.04, None)


# ---------------------------------------------------------------- CTC's prefix scores


def log_probs(num_frames: int, size: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 2 * torch.randn(num_frames, size, generator=generator, dtype=torch.float64)
    return logits_TV.log_softmax(-1).numpy()


def text_of(path) -> tuple[int, ...]:
    return tuple(k for k, _ in itertools.groupby(path) if k != BLANK_ID)


@pytest.mark.parametrize("seed", range(3))
def test_prefix_scores_are_sums_over_all_paths(seed):
    log_probs_TV = log_probs(5, 3, seed)
    prefixes, wholes = {}, {}
    for path in itertools.product(range(3), repeat=5):
        score, text = sum(log_probs_TV[t, v] for t, v in enumerate(path)), text_of(path)
        wholes[text] = np.logaddexp(wholes.get(text, -np.inf), score)
        for n in range(len(text) + 1):
            prefixes[text[:n]] = np.logaddexp(prefixes.get(text[:n], -np.inf), score)
    scorer = CtcPrefixScorer(log_probs_TV)
    texts, state = [()], scorer.start()
    for _ in range(6):
        whole_K = scorer.whole(state)
        longer_KC = scorer.longer(state, np.tile([1, 2], (len(texts), 1)))
        for row, text in enumerate(texts):
            assert whole_K[row] == pytest.approx(wholes.get(text, -np.inf), abs=1e-9)
            for column, token in enumerate((1, 2)):
                expected = prefixes.get((*text, token), -np.inf)
                assert longer_KC[row, column] == pytest.approx(expected, abs=1e-9)
        rows, tokens = np.repeat(np.arange(len(texts)), 2), np.tile([1, 2], len(texts))
        texts = [(*texts[r], int(t)) for r, t in zip(rows, tokens, strict=True)]
        state = scorer.extend(state, rows, tokens)


def test_prefix_scores_of_a_long_and_certain_utterance_are_exact():
    """Products of thousands of posteriors next to 0 and 1 must not lose what is small."""
    path = ([3] * 4 + [0] * 6 + [4] * 5) * 100
    logits_TV = torch.full((len(path), 6), -40.0, dtype=torch.float64)
    logits_TV[torch.arange(len(path)), torch.tensor(path)] = 40.0
    logits_TV += torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(0))
    log_probs_TV = logits_TV.log_softmax(-1).numpy()
    text = (3, 4) * 100
    scorer = CtcPrefixScorer(log_probs_TV)
    state = scorer.start()
    for token in text:
        state = scorer.extend(state, np.array([0]), np.array([token]))
    assert scorer.whole(state)[0] == pytest.approx(ctc_log_prob(log_probs_TV, text), rel=1e-9, abs=1e-7)
    assert math.isfinite(scorer.whole(state)[0])
