"""Transducer searches: against brute force over all paths, and against the head's greedy search."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import BLANK_ID, UNK_ID, ModelOutput
from kdrecipe.model.heads.rnnt import RnntHead
from kdrecipe.testing.decode_checks import LetterTokens
from kdrecipe_plugins.decoders.rnnt_beam import RnntBeam
from kdrecipe_plugins.decoders.rnnt_greedy import RnntGreedy

SIZE, WIDTH, SHIFT_S = 5, 8, 0.04  # <blk>, <sos/eos>, <unk>, a, b


class Recogniser(nn.Module):
    """A random head, sharpened until it has opinions."""

    def __init__(self, seed: int, size: int = SIZE, **options) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = RnntHead.Config(predictor_dim=8, joiner_dim=8, **options)
        self.heads = nn.ModuleDict({"rnnt": RnntHead(config, WIDTH, size)})
        with torch.no_grad():
            for weight in self.parameters():
                weight *= 3
        self.double().eval()

    def output(self, lens: list[int], seed: int = 0) -> ModelOutput:
        generator = torch.Generator().manual_seed(seed)
        hidden_BTD = torch.randn(len(lens), max(lens), WIDTH, dtype=torch.float64, generator=generator)
        return ModelOutput(hidden_BTD, torch.tensor(lens))


class RandomLm:
    """Log-probabilities that depend on the whole history."""

    def start(self):
        return ()

    def score(self, state, token):
        return float(self._row(state)[token]), (*state, token)

    def end(self, state):
        return float(self._row(state)[1])

    def _row(self, state):
        logits = 2 * np.random.default_rng([len(state), *state]).standard_normal(SIZE)
        return logits - np.logaddexp.reduce(logits)


@torch.no_grad()
def log_prob(model: Recogniser, out: ModelOutput, path: tuple[int, ...]) -> float:
    """Of a path with one label per frame."""
    head, total = model.heads["rnnt"], 0.0
    state = head.start(1)
    for encoder_J, label in zip(head.encode(out.hidden_BTD)[0], path, strict=False):
        total += float(head.join(encoder_J, head.predict(state)).log_softmax(-1)[0, label])
        if label not in (BLANK_ID, UNK_ID):
            state = head.advance(state, torch.tensor([label]))
    return total


def texts_with_scores(model, out, lm=None, lm_weight=0.0, length_bonus=0.0) -> dict[tuple[int, ...], float]:
    """Every text's score, summed over all paths with at most one token per frame."""
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(SIZE), repeat=int(out.lens_B[0])):
        text = tuple(v for v in path if v not in (BLANK_ID, UNK_ID))
        totals[text] = np.logaddexp(totals.get(text, -np.inf), log_prob(model, out, path))
    for text in totals:
        totals[text] += length_bonus * len(text)
        if lm is not None:
            state = lm.start()
            for token in text:
                score, state = lm.score(state, token)
                totals[text] += lm_weight * score
            totals[text] += lm_weight * lm.end(state)
    return totals


OPTIONS = [{}, {"lm_weight": 0.5}, {"length_bonus": 1.5}, {"lm_weight": 1.0, "length_bonus": -1.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("seed", "predictor"), [(0, {}), (1, {"context_size": 1}), (2, {"predictor": "lstm"}), (3, {})]
)
def test_a_wide_beam_sums_over_all_paths(seed, predictor, options):
    model = Recogniser(seed, **predictor)
    out = model.output([4], seed)
    lm = RandomLm() if "lm_weight" in options else None
    decoder = RnntBeam(RnntBeam.Config(beam=10_000, **options), LetterTokens(SIZE), SHIFT_S, lm)
    (found,) = decoder.decode(model, out)
    expected = texts_with_scores(model, out, lm, **options)
    before = predictor.get("context_size", 1 if predictor else 2)
    best = max(expected, key=lambda text: expected[text] / (len(text) + before))
    assert tuple(found.tokens) == best
    assert found.score == pytest.approx(expected[best], abs=1e-9)


def test_the_problems_are_not_trivial():
    found = set()
    for seed in range(6):
        model = Recogniser(seed)
        decoder = RnntBeam(RnntBeam.Config(beam=100), LetterTokens(SIZE), SHIFT_S)
        found.add(tuple(decoder.decode(model, model.output([4], seed))[0].tokens))
    assert len(found) >= 4


def slow_modified_beam_search(model, out, beam: int) -> list[int]:
    """sherpa-onnx's, word for word: a dictionary of texts, each with its score."""
    head = model.heads["rnnt"]
    num_before = head.predictor.context_size
    texts: dict[tuple[int, ...], float] = {(): 0.0}
    for encoder_J in head.encode(out.hidden_BTD)[0, : int(out.lens_B[0])]:
        rows = []
        for text, score in texts.items():
            state = head.start(1)
            for token in text:
                state = head.advance(state, torch.tensor([token]))
            log_probs_V = head.join(encoder_J, head.predict(state))[0].log_softmax(-1)
            rows += [(score + float(p), text, token) for token, p in enumerate(log_probs_V)]
        texts = {}
        for score, text, token in sorted(rows, key=lambda row: -row[0])[:beam]:
            longer = text if token in (BLANK_ID, UNK_ID) else (*text, token)
            texts[longer] = np.logaddexp(texts.get(longer, -np.inf), score)
    return list(max(texts, key=lambda text: texts[text] / (len(text) + num_before)))


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_narrow_beams_are_those_of_sherpa_onnx(beam):
    for seed in range(5):
        model = Recogniser(seed, size=9)
        out = model.output([15], seed)
        (found,) = RnntBeam(RnntBeam.Config(beam=beam), LetterTokens(9), SHIFT_S).decode(model, out)
        with torch.no_grad():
            assert found.tokens == slow_modified_beam_search(model, out, beam)


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_a_beam_of_one_is_greedy(predictor):
    model = Recogniser(4, size=9, predictor=predictor)
    out = model.output([20, 7, 13])
    greedy = RnntGreedy(RnntGreedy.Config(), LetterTokens(9), SHIFT_S).decode(model, out)
    beam = RnntBeam(RnntBeam.Config(beam=1), LetterTokens(9), SHIFT_S).decode(model, out)
    assert [h.tokens for h in greedy] == model.heads["rnnt"].greedy(out.hidden_BTD, out.lens_B)
    assert any(h.tokens for h in greedy)
    for ours, theirs in zip(beam, greedy, strict=True):
        assert (ours.tokens, ours.times_s) == (theirs.tokens, theirs.times_s)
        assert ours.score == pytest.approx(theirs.score, abs=1e-9)


def test_greedys_score_is_the_log_probability_of_its_path():
    model = Recogniser(1)
    out = model.output([10])
    (found,) = RnntGreedy(RnntGreedy.Config(), LetterTokens(SIZE), SHIFT_S).decode(model, out)
    frames = dict(zip((round(t / SHIFT_S) for t in found.times_s), found.tokens, strict=True))
    assert len(frames) == len(found.tokens) > 0
    quiet = [frame for frame in range(10) if frame not in frames]
    paths = itertools.product((BLANK_ID, UNK_ID), repeat=len(quiet))
    fitting = (tuple({**frames, **dict(zip(quiet, p, strict=True))}[t] for t in range(10)) for p in paths)
    assert found.score == pytest.approx(max(log_prob(model, out, path) for path in fitting), abs=1e-9)


@pytest.mark.parametrize("cls", [RnntGreedy, RnntBeam])
def test_unknown_tokens_count_as_blanks(cls):
    model = Recogniser(0)
    with torch.no_grad():
        model.heads["rnnt"].output.bias[UNK_ID] += 100
    (found,) = cls(cls.Config(), LetterTokens(SIZE), SHIFT_S).decode(model, model.output([6]))
    assert (found.tokens, found.times_s) == ([], [])


def test_lm_weight_without_a_language_model_is_refused():
    with pytest.raises(RecipeError, match="no language model"):
        RnntBeam(RnntBeam.Config(lm_weight=0.5), LetterTokens(SIZE), SHIFT_S, None)
