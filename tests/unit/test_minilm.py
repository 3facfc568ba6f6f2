"""Relations within attention."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import Hidden, LossSetup, ModelOutput, Targets
from kdrecipe.testing.contracts import loss_contract
from kdrecipe.testing.models import loss_setup, model_info, random_batch, random_output, targets_like
from kdrecipe_plugins.losses.minilm import MiniLm

LENS = (9, 6, 7)
BATCH = random_batch([4 * n for n in LENS], num_tokens=[4, 1, 2])
WIDER = LossSetup(model_info(width=4), model_info(width=6))


def minilm(setup=None, **options):
    config = MiniLm.Config(**{"layers": {"encoder.0": "encoder.3"}, "heads": 2, **options})
    return MiniLm(config, setup or loss_setup())


def by_hand(student, teacher, lens, heads, causal):
    """Sum over utterances, heads and frames, one frame at a time."""
    total = 0.0
    for row, length in enumerate(lens):
        for head in range(heads):
            for t in range(length):
                seen = t + 1 if causal else length
                pair = []
                for a, b in (teacher, student):
                    d = a.shape[-1] // heads
                    part = slice(head * d, (head + 1) * d)
                    scores = [float(a[row, t, part] @ b[row, j, part]) / math.sqrt(d) for j in range(seen)]
                    norm = sum(math.exp(s) for s in scores)
                    pair.append([math.exp(s) / norm for s in scores])
                total += sum(p * math.log(p / q) for p, q in zip(*pair, strict=True))
    return total / heads


@pytest.mark.parametrize("relations", [["qk", "vv"], ["qq", "kk"]])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_it_is_the_kl_of_relations_summed_over_frames(part, relations):
    prefix = "encoder" if part == "encoder" else "attention"
    loss = minilm(WIDER, layers={f"{prefix}.0": f"{prefix}.3"}, part=part, relations=relations)
    out = random_output(LENS, taps=loss.taps, info=WIDER.student, batch=BATCH)
    out.taps = {name: torch.randn_like(x) for name, x in out.taps.items()}
    targets = targets_like(out, loss.requires(loss.config), teacher=WIDER.teacher)
    lens = LENS if part == "encoder" else (5, 2, 3)
    kind = "hidden" if part == "encoder" else "token_hidden"
    want = 0.0
    for a, b in relations:
        mine = [out.taps[f"{prefix}.0.{x}"] for x in (a, b)]
        its = [targets.hidden(f"{prefix}.3.{x}", kind).values_BTD for x in (a, b)]
        want += by_hand(mine, its, lens, 2, part == "decoder")
    result = loss(out, targets, BATCH)
    assert float(result.total) == pytest.approx(want, rel=1e-4)
    assert int(result.count) == sum(lens)


def test_two_frames_by_hand():
    """Values 1 and -1, one head of width 1: a frame relates to itself with e / (e + 1/e)."""
    lens = torch.tensor([2])
    out = ModelOutput(torch.zeros(1, 2, 1), lens, taps={"encoder.0.v": torch.tensor([[[1.0], [-1.0]]])})
    still = Targets({"hidden:encoder.3.v": Hidden(torch.zeros(1, 2, 1), lens)})  # relates to both alike
    narrow = LossSetup(model_info(width=1), model_info(width=1))
    result = minilm(narrow, relations=["vv"], heads=1)(out, still, BATCH)
    q = math.e / (math.e + 1 / math.e)
    want = 2 * (0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q)))
    assert float(result.total) == pytest.approx(want, rel=1e-5)


DECODER = {"layers": {"attention.0": "attention.1"}, "part": "decoder", "heads": 2}
TWO = {"encoder.0": "encoder.1", "encoder.1": "encoder.2"}
CONTRACTS = {
    "v2": loss_contract(MiniLm, {"layers": TWO, "relations": ["qq", "kk", "vv"], "heads": 1}),
    "decoder": loss_contract(MiniLm, DECODER),
    "wider": loss_contract(
        MiniLm, setup=WIDER, expected_failed_checks={"minimum_at_teacher": "the widths differ"}
    ),
}  # fmt: skip
CHECKS = [(name, check) for name, contract in CONTRACTS.items() for check in contract.bound()]


@pytest.mark.parametrize("check", [c for _, c in CHECKS], ids=[f"{n}-{c.check_id}" for n, c in CHECKS])
def test_contract(check):
    check()


@pytest.mark.parametrize(
    ("setup", "options", "message", "remedy"),
    [
        (
            None,
            {"layers": {"encoder.99": "encoder.0"}},
            "student declares no tap 'encoder.99.k'",
            "encoder.9",
        ),
        (None, {"layers": {"encoder.0": "encodr.0"}}, "teacher declares no tap 'encodr.0.k'", "encoder.0"),
        (None, {"layers": {"attentio.0": "attention.0"}, "part": "decoder"}, "in its decoder", "attention"),
        (None, {"heads": 3}, "3 relation heads can't share the student's width 4", "divides"),
        (WIDER, {"heads": 4}, "4 relation heads can't share the teacher's width 6", "divides"),
    ],
)
def test_what_does_not_fit(setup, options, message, remedy):
    with pytest.raises(RecipeError) as caught:
        minilm(setup, **options)
    assert message in str(caught.value)
    assert remedy in str(caught.value)


def test_a_decoder_has_no_layers_of_an_encoder():
    with pytest.raises(ValidationError, match=r"part: decoder takes layers of decoders, not 'encoder\.0'"):
        MiniLm.Config(layers={"attention.0": "encoder.0"}, part="decoder")


def test_other_frame_counts_are_refused():
    loss = minilm()
    out = random_output(LENS, taps=loss.taps)
    targets = targets_like(out, loss.requires(loss.config))
    targets = targets.map(lambda x: x - 1 if x.dim() == 1 else x)
    with pytest.raises(DataError, match="other frame counts"):
        loss(out, targets, BATCH)
