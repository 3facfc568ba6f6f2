"""Decoders: against brute force where that is possible, against each other elsewhere."""

import itertools
import time

import numpy as np
import pytest
import torch

from kdrecipe.interfaces import BLANK_ID, ModelOutput
from kdrecipe.lattice.ctc import prefix_beam_search
from kdrecipe_plugins.decoders.ctc_greedy import CtcGreedy
from kdrecipe_plugins.decoders.ctc_prefix_beam import CtcPrefixBeam, align


class Letters:
    """A token table whose tokens are letters."""

    vocab_id = "letters"

    def __init__(self, size: int = 30) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def encode(self, text):
        return [ord(c) - ord("a") + 1 for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 1) for i in ids)


def output_of(logits_BTV: torch.Tensor, lens_B: list[int]) -> ModelOutput:
    return ModelOutput(logits_BTV, torch.tensor(lens_B), logits={"ctc": logits_BTV})


def one_hot(paths: list[list[int]], size: int = 4) -> torch.Tensor:
    """Logits in which each path (padded with token 3) is all but certain."""
    longest = max(map(len, paths))
    ids_BT = torch.tensor([p + [3] * (longest - len(p)) for p in paths])
    return torch.nn.functional.one_hot(ids_BT, size).float() * 50


def random_log_probs(num_frames: int, size: int, seed: int, sharpness: float = 1.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_frames, size, generator=generator, dtype=torch.float64) * sharpness
    return logits.log_softmax(-1).numpy()


def collapse(path) -> tuple[int, ...]:
    return tuple(k for k, _ in itertools.groupby(path) if k != BLANK_ID)


def enumerate_texts(log_probs_TV: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every text's log-probability, by summing over every path."""
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs_TV.shape[1]), repeat=len(log_probs_TV)):
        score = sum(log_probs_TV[t, v] for t, v in enumerate(path))
        text = collapse(path)
        totals[text] = np.logaddexp(totals.get(text, -np.inf), score)
    return totals


@pytest.mark.parametrize("cls", [CtcGreedy, CtcPrefixBeam])
def test_merges_repeats_drops_blanks_ignores_padding_and_times_each_token(cls):
    out = output_of(one_hot([[1, 1, 0, 1, 2, 2], [0, 2]]), [6, 2])
    first, second = cls(cls.Config(), Letters(4), 0.04).decode(torch.nn.Identity(), out)
    assert (first.text, first.tokens) == ("aab", [1, 1, 2])
    assert first.times_s == pytest.approx([0.0, 0.12, 0.16])
    assert (second.text, second.times_s) == ("b", pytest.approx([0.04]))
    assert second.score == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("cls", [CtcGreedy, CtcPrefixBeam])
def test_silence_and_no_frames_are_empty_hypotheses(cls):
    out = output_of(one_hot([[0, 0, 0], [1, 1, 1]]), [3, 0])
    silence, nothing = cls(cls.Config(), Letters(4), 0.04).decode(torch.nn.Identity(), out)
    assert (silence.text, silence.tokens, silence.times_s) == ("", [], [])
    assert (nothing.text, nothing.tokens, nothing.times_s, nothing.score) == ("", [], [], 0.0)


def test_greedy_score_is_the_best_paths_log_probability():
    logits_BTV = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    (hypothesis,) = CtcGreedy(CtcGreedy.Config(), Letters(4), 0.04).decode(
        torch.nn.Identity(), output_of(logits_BTV, [4])
    )
    expected = logits_BTV[0, :4].log_softmax(-1).max(-1).values.sum()
    assert hypothesis.score == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "size", "seed"), [(1, 3, 0), (4, 3, 1), (5, 4, 2), (6, 3, 3), (5, 3, 4)]
)
def test_unpruned_beam_gives_every_text_its_exact_probability(num_frames, size, seed):
    log_probs_TV = random_log_probs(num_frames, size, seed)
    expected = enumerate_texts(log_probs_TV)
    found = prefix_beam_search(log_probs_TV, beam=10_000, num_tokens_per_frame=size)
    assert dict(found) == pytest.approx(expected)
    assert found[0][0] == max(expected, key=expected.get)
    assert np.logaddexp.reduce([score for _, score in found]) == pytest.approx(0.0, abs=1e-9)


def test_beam_finds_the_likelier_text_where_the_best_path_misleads():
    # the single best path is all blanks (0.36); "a" has three paths of 0.24 + 0.24 + 0.16
    log_probs_TV = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert prefix_beam_search(log_probs_TV, beam=2, num_tokens_per_frame=1)[0] == (
        (1,),
        pytest.approx(np.log(0.64)),
    )


def test_pruning_only_lowers_the_score():
    log_probs_TV = random_log_probs(12, 8, seed=5)
    wide = dict(prefix_beam_search(log_probs_TV, 500, 7))
    for beam, num_tokens in [(1, 1), (2, 3), (8, 2)]:
        for text, score in prefix_beam_search(log_probs_TV, beam, num_tokens):
            assert score <= wide.get(text, 0.0) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_alignment_is_the_best_of_all_alignments(seed):
    log_probs_TV = random_log_probs(6, 3, seed)
    text = (1, 1, 2) if seed % 2 else (2, 1)
    paths = [p for p in itertools.product(range(3), repeat=6) if collapse(p) == text]
    best = max(paths, key=lambda p: sum(log_probs_TV[t, v] for t, v in enumerate(p)))
    previous = (BLANK_ID, *best[:-1])
    starts = [t for t, v in enumerate(best) if v not in (BLANK_ID, previous[t])]
    assert align(log_probs_TV, text) == starts


def test_beam_of_ten_seconds_takes_well_under_real_time():
    log_probs_TV = random_log_probs(250, 500, seed=0, sharpness=4.0)
    start = time.perf_counter()
    prefix_beam_search(log_probs_TV, beam=8, num_tokens_per_frame=8)
    assert time.perf_counter() - start < 2.0
