"""The flat start of CTC: an even alignment over the speech, and a term that fades."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from train_toys import ctc, toy_batches, toy_model, toy_options, toy_run

from kdrecipe.interfaces import Batch
from kdrecipe.train.flat_start import NAME, even_alignment, with_flat_start
from kdrecipe.train.objective import Objective, Term


def batch(energies, tokens, labelled=None):
    """A batch of utterances with these energies per frame (4 features each) and tokens."""
    lens = torch.tensor([len(e) for e in energies])
    features = torch.zeros(len(energies), int(lens.max()), 4)
    for row, values in zip(features, energies, strict=True):
        row[: len(values)] = torch.tensor(values).unsqueeze(1)
    token_lens = torch.tensor([len(t) for t in tokens])
    padded = torch.zeros(len(tokens), int(token_lens.max()), dtype=torch.int64)
    for row, values in zip(padded, tokens, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    known = torch.ones(len(tokens), dtype=torch.bool) if labelled is None else torch.tensor(labelled)
    ids = [str(i) for i in range(len(tokens))]
    return Batch(ids, features, lens, padded, token_lens, known, [""] * len(tokens))


def test_tokens_are_spread_over_the_speech_and_blanks_around_it():
    quiet, loud = [-10.0], [0.0]
    found = even_alignment(
        batch([quiet * 8 + loud * 24 + quiet * 8, loud * 8], [[5, 6, 7], [9]]), torch.tensor([10, 2]), 10
    )
    assert found.tolist() == [[0, 0, 5, 5, 6, 6, 7, 7, 0, 0], [9, 9, *[-1] * 8]]


def test_nothing_is_said_of_what_has_no_label_no_text_or_too_few_frames():
    one = [0.0] * 8
    given_batch = batch([one, one, one], [[5], [], [1, 2, 3]], labelled=[False, True, True])
    assert (even_alignment(given_batch, torch.tensor([2, 2, 2]), 2) == -1).all()


def test_speech_too_short_for_its_tokens_takes_the_whole_utterance():
    found = even_alignment(batch([[-10.0] * 12 + [0.0] * 4], [[1, 2, 3, 4]]), torch.tensor([4]), 4)
    assert found.tolist() == [[1, 2, 3, 4]]


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=15),
)
def test_every_token_has_a_frame_in_order(energy, tokens):
    length = (len(energy) + 3) // 4
    row = even_alignment(batch([energy], [tokens]), torch.tensor([length]), length + 2)[0].tolist()
    assert row[length:] == [-1, -1]
    if length < len(tokens):
        assert set(row) == {-1}
        return
    spoken = [t for t in row[:length] if t]
    places = [n * len(tokens) // len(spoken) for n in range(len(spoken))]
    assert spoken == [tokens[place] for place in places]
    assert sorted(set(places)) == list(range(len(tokens)))


def test_it_fades_and_is_gone():
    objective = with_flat_start(Objective([Term("ctc", 0.5, ctc())]), 4)
    assert [term.name for term in objective.terms] == ["ctc", NAME]
    seen = []
    for step in range(1, 7):
        objective.at_step(step)
        seen.append((objective.weights, objective.at_work))
    assert [weights for weights, _ in seen] == [[0.5, w] for w in (0.5, 0.375, 0.25, 0.125, 0.0, 0.0)]
    assert [at_work[1] for _, at_work in seen] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("steps", [0, 9])
def test_only_ctc_has_one(steps):
    other = Objective([Term("ctc", 0.0, ctc())])
    assert with_flat_start(other, steps) is other
    assert with_flat_start(Objective([Term("ctc", 1.0, ctc())]), 0).terms[0].name == "ctc"


def test_a_run_has_it_for_a_quarter_of_its_steps_at_most_and_does_not_count_it_as_loss(tmp_path):
    options = toy_options(epochs=8, flat_start=10**6, log_every=1, schedule="cosine")
    objective = Objective([Term("ctc", 1.0, ctc())])
    _, result = toy_run(
        tmp_path, model=toy_model(), batches=toy_batches(), objective=objective, options=options, teachers={}
    )

    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in steps if entry["event"] == "step"]
    with_it = [entry["step"] for entry in steps if NAME in entry["terms"]]
    assert with_it == list(range(1, result.steps // 4 + 1))
    assert all(entry["loss"] == entry["terms"]["ctc"] for entry in steps)
