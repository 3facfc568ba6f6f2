"""The logged share of frames on which student and teacher decide alike."""

import pytest
import torch

from kdrecipe.interfaces import Hidden, ModelOutput, Posteriors, Targets
from kdrecipe_plugins.metrics.agreement import train_metrics

STUDENT = torch.tensor([[[2.0, 1, 0], [0, 3, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [5, 0, 0]]])


def _found(posteriors):
    out = ModelOutput(hidden_BTD=STUDENT, lens_B=posteriors.lens_B, logits={"ctc": STUDENT})
    return train_metrics(
        out,
        {"big": Targets({"frame_logits:ctc": posteriors, "hidden:x": Hidden(STUDENT, posteriors.lens_B)})},
    )


def test_counts_valid_frames_only():
    teacher = STUDENT.roll(1, dims=0).log_softmax(-1)
    # Utterance 0: best tokens 0 1 2 against 0 1 0; utterance 1, two frames valid: 0 1 against 0 1.
    assert _found(Posteriors(teacher, torch.tensor([3, 2]))) == {"agreement/big": pytest.approx(4 / 5)}


def test_top_k_targets_count_in_the_vocabulary():
    best = torch.tensor([[[0, 1], [1, 0], [2, 1]], [[0, 1], [1, 2], [1, 0]]])
    log_probs = torch.tensor([0.7, 0.2]).log().expand(2, 3, 2)
    tail = torch.full((2, 3), 0.1).log()
    targets = Posteriors(log_probs, torch.tensor([3, 3]), best, tail)
    assert _found(targets) == {"agreement/big": pytest.approx(5 / 6)}


def test_says_nothing_without_a_teacher():
    out = ModelOutput(hidden_BTD=STUDENT, lens_B=torch.tensor([3, 3]), logits={"ctc": STUDENT})
    assert train_metrics(out, {}) == {}
