"""Teachers that hear the student's own masks."""

from __future__ import annotations

import pytest
import torch
from train_toys import Calm, Imitate, ToyTeacher, toy_batches, toy_model, toy_objective, toy_options, toy_run

from kdrecipe.errors import TrainingError
from kdrecipe.interfaces import LossOutput, Targets
from kdrecipe.train.loop import Objective, Term


class Views:
    """Keeps how many rows of targets it got for how many utterances."""

    num_views = 2

    def __init__(self):
        self.seen = []

    def __call__(self, out, targets, batch):
        self.seen.append((targets.posteriors(), len(batch)))
        return LossOutput(out.logits["ctc"].sum(), len(batch))


def heard_and_seen(tmp_path, masked, objective=None, **options):
    """What the teacher heard and what the student saw, step by step."""
    teacher, model, seen = ToyTeacher(), toy_model(0.0), []
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    toy_run(
        tmp_path,
        model=model,
        objective=objective or Objective([Term("imitate", 1.0, Imitate(), "t")]),
        teachers={"t": teacher},
        options=toy_options(epochs=1, **options),
        masked_teachers=masked,
    )
    return [batch.features_BTF for batch in teacher.seen], seen


def test_a_clean_teacher_hears_no_masks(tmp_path):
    heard, seen = heard_and_seen(tmp_path, masked=False)
    assert any(not torch.equal(h, s) for h, s in zip(heard, seen, strict=True))


def test_a_masked_teacher_hears_what_the_student_sees(tmp_path):
    heard, seen = heard_and_seen(tmp_path / "one", masked=True)
    assert len(heard) > 1
    for h, s in zip(heard, seen, strict=True):
        assert torch.equal(h, s)
    clean, _ = heard_and_seen(tmp_path / "two", masked=False)
    assert any(not torch.equal(h, c) for h, c in zip(heard, clean, strict=True))


def test_each_view_has_targets_of_its_own(tmp_path):
    loss = Views()
    heard, seen = heard_and_seen(tmp_path, True, Objective([Term("views", 1.0, loss, "t")]))
    posteriors, rows = loss.seen[-1]
    assert len(posteriors.lens_B) == rows == len(heard[-1]) == len(seen[-1])
    first, second = posteriors.log_probs_BTK.chunk(2)
    assert not torch.equal(first, second)


def test_accumulation_finds_the_same_masks_in_both_passes(tmp_path):
    objective = Objective([Term("imitate", 1.0, Imitate(), "t"), Term("calm", 0.1, Calm())])
    heard, seen = heard_and_seen(tmp_path, True, objective, accumulate=2)
    for features_BTF in seen:
        assert any(features_BTF.shape == h.shape and torch.equal(features_BTF, h) for h in heard)


class Stop(Exception):
    pass


def test_it_resumes_bit_for_bit(tmp_path):
    def stop(model, done, num_steps):
        if done == 5:
            raise Stop

    whole, _ = toy_run(tmp_path / "whole", objective=toy_objective(), masked_teachers=True)
    with pytest.raises(Stop):
        toy_run(tmp_path / "parts", objective=toy_objective(), masked_teachers=True, on_step=stop)
    again, _ = toy_run(tmp_path / "parts", model=toy_model(seed=3), masked_teachers=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_words_of_two_views_are_refused(tmp_path):
    class Speaking(ToyTeacher):
        def targets(self, batch):
            found = super().targets(batch)
            return Targets(found.items, batch.tokens_BU, batch.token_lens_B)

    with pytest.raises(TrainingError, match="other words in each masked view"):
        toy_run(
            tmp_path,
            objective=Objective([Term("views", 1.0, Views(), "t")]),
            teachers={"t": Speaking()},
            batches=toy_batches(labelled=[0, 1]),
            masked_teachers=True,
        )
