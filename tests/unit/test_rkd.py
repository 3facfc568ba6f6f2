"""Distances between utterances; losses over pairs of a batch."""

from __future__ import annotations

import pytest
import torch

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Hidden, LossOutput, LossSetup, ModelOutput, Targets
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import loss_setup, model_info, random_batch
from kdrecipe_plugins.losses.rkd import Rkd


def rkd(**options):
    return Rkd(Rkd.Config(layer="encoder.5", **options), loss_setup())


def test_three_utterances_by_hand():
    """Points at 0, 3 and 4 of the student, at 0, 1 and 2 of the teacher; the second frame is padding."""
    student = torch.tensor([[[0.0], [9.0]], [[3.0], [9.0]], [[4.0], [9.0]]])
    teacher = torch.tensor([[[0.0]], [[1.0]], [[2.0]]])
    ones = torch.ones(3, dtype=torch.int64)
    out = ModelOutput(student, ones)
    result = rkd()(out, Targets({"hidden:encoder.5": Hidden(teacher, ones)}), random_batch())
    # distances 3, 4, 1 with mean 8/3; 1, 2, 1 with mean 4/3; each pair twice
    differences = [3 / (8 / 3) - 1 / (4 / 3), 4 / (8 / 3) - 2 / (4 / 3), 1 / (8 / 3) - 1 / (4 / 3)]
    assert float(result.total) == pytest.approx(2 * sum(d * d / 2 for d in differences), rel=1e-5)
    assert int(result.count) == 9


def test_frames_are_averaged_and_widths_may_differ():
    rng = torch.Generator().manual_seed(0)
    lens = torch.tensor([5, 3, 4, 2])
    values = torch.randn(4, 6, 3, generator=rng)
    means = torch.stack([values[i, :n].mean(0) for i, n in enumerate(lens.tolist())])
    wide = torch.cat([means, means], dim=1)[:, None]  # the same distances but for their scale
    ones = torch.ones(4, dtype=torch.int64)
    result = rkd()(
        ModelOutput(values, lens), Targets({"hidden:encoder.5": Hidden(wide, ones)}), random_batch()
    )
    assert float(result.total) == pytest.approx(0.0, abs=1e-9)


def test_of_one_utterance_there_is_nothing_to_compare():
    hidden = torch.randn(1, 4, 3, requires_grad=True)
    lens = torch.tensor([4])
    targets = Targets({"hidden:encoder.5": Hidden(torch.randn(1, 4, 3), lens)})
    result = rkd()(ModelOutput(hidden, lens), targets, random_batch())
    assert result.total.item() == 0
    result.total.backward()
    assert not hidden.grad.any()


def test_an_unknown_tap_is_named():
    with pytest.raises(RecipeError, match=r"no tap 'encoder\.77'"):
        rkd(student_layer="encoder.77")


OTHER = LossSetup(model_info(), model_info(width=7))
CONTRACTS = {
    "tapped": loss_contract(Rkd, {"layer": "encoder.5", "student_layer": "encoder.1"}),
    "wider": loss_contract(
        Rkd, setup=OTHER, expected_failed_checks={"minimum_at_teacher": "there is no such student"}
    ),
}
CHECKS = [(name, check) for name, contract in CONTRACTS.items() for check in contract.bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


class Undeclared(Rkd):
    per = "utterances"


class CountsUtterances(Rkd):
    def __call__(self, out, targets, batch):
        return LossOutput(super().__call__(out, targets, batch).total, (out.lens_B > 0).sum())


@pytest.mark.parametrize(("cls", "what"), [(Undeclared, "total is"), (CountsUtterances, "count is")])
def test_pairs_are_held_to_what_they_declare(cls, what):
    found = {r.check_id: r for r in loss_contract(cls).results()}
    assert [name for name, r in found.items() if not r.ok] == ["doubling"]
    assert what in found["doubling"].reason
