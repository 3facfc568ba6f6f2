"""Losses over several teachers at once."""

from __future__ import annotations

import math

import pytest
import torch
from train_toys import ToyTeacher, toy_batches, toy_options, toy_run

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import LossOutput, LossSetup, ModelOutput, Posteriors, Targets
from kdrecipe.recipe.sections import Term as TermSection
from kdrecipe.recipe.terms import labels_of
from kdrecipe.testing.models import (
    VOCAB_SIZE,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)
from kdrecipe.train.loop import Objective, Term
from kdrecipe_plugins.losses.ensemble_kl import EnsembleKl
from kdrecipe_plugins.losses.kl import KlLoss

LENS = (9, 6, 7)
BATCH = random_batch([4 * n for n in LENS], num_tokens=[2, 1, 1])
SETUP = LossSetup(model_info(), teachers={"a": model_info(), "b": model_info()})


def ensemble(**options):
    return EnsembleKl(EnsembleKl.Config(**options), SETUP)


def example(**more):
    out = random_output(LENS, batch=BATCH)
    needs = EnsembleKl.requires(EnsembleKl.Config(**more))
    return out, {name: targets_like(out, needs, seed=seed) for name, seed in (("a", 1), ("b", 2))}


def kl_of(out, targets, **options):
    return float(KlLoss(KlLoss.Config(**options), loss_setup())(out, targets, BATCH).total)


def test_the_mean_is_the_mean_of_kls():
    out, targets = example()
    a, b = (kl_of(out, targets[name], temperature=2.0) for name in "ab")
    result = ensemble(temperature=2.0)(out, targets, BATCH)
    assert float(result.total) == pytest.approx((a + b) / 2, rel=1e-5)
    assert int(result.count) == sum(LENS)
    fixed = ensemble(weights="fixed", fixed={"a": 3, "b": 1}, temperature=2.0)(out, targets, BATCH)
    assert float(fixed.total) == pytest.approx((3 * a + b) / 4, rel=1e-5)


def peaked(labels, sure=0.9):
    """Posteriors whose best class at each frame is given."""
    p = torch.full((len(labels), VOCAB_SIZE), (1 - sure) / (VOCAB_SIZE - 1))
    p[torch.arange(len(labels)), torch.tensor(labels)] = sure
    return p.log()


def heard(*rows, sure=0.9):
    log_probs = torch.stack([peaked(row, sure) for row in rows])
    lens_B = torch.tensor([len(row) for row in rows])
    return Targets({"frame_logits:ctc": Posteriors(log_probs, lens_B)})


def two_utterances():
    """Of the first, teacher a hears all and b half; of the second it is the other way round."""
    batch = random_batch([16, 16], num_tokens=[2, 2])
    batch.tokens_BU = torch.tensor([[3, 4], [5, 2]])
    a = heard([3, 0, 4, 0], [0, 0, 2, 2])
    b = heard([3, 3, 3, 0], [5, 0, 2, 0])
    out = ModelOutput(torch.zeros(2, 4, 2), torch.tensor([4, 4]), {"ctc": torch.randn(2, 4, VOCAB_SIZE)})
    return out, {"a": a, "b": b}, batch


def per_utterance(out, targets, batch):
    """KL of each teacher and utterance, by hand."""
    q = out.logits["ctc"].log_softmax(-1)
    found = {}
    for name, t in targets.items():
        p = t.posteriors().log_probs_BTK
        found[name] = (p.exp() * (p - q)).sum((1, 2)).tolist()
    return found


def test_teachers_weigh_by_their_errors_in_the_utterance():
    out, targets, batch = two_utterances()
    kl = per_utterance(out, targets, batch)
    good = 1 / (1 + math.exp(-10 * 0.5))  # no error against one of two tokens
    want = good * (kl["a"][0] + kl["b"][1]) + (1 - good) * (kl["b"][0] + kl["a"][1])
    found = ensemble(weights="error")(out, targets, batch)
    assert float(found.total) == pytest.approx(want, rel=1e-5)
    best = ensemble(weights="error", best=True)(out, targets, batch)
    assert float(best.total) == pytest.approx(kl["a"][0] + kl["b"][1], rel=1e-5)


def test_without_transcripts_they_weigh_by_how_sure_they_are():
    out, _, batch = two_utterances()
    targets = {
        "a": heard([3, 0, 4, 0], [3, 0, 4, 0], sure=0.9),
        "b": heard([3, 0, 4, 0], [3, 0, 0, 0], sure=0.6),
    }
    batch.labelled_B[:] = False
    kl = per_utterance(out, targets, batch)
    share = 1 / (1 + math.exp(-10 * (0.9 - 0.6)))
    want = share * sum(kl["a"]) + (1 - share) * sum(kl["b"])
    for weights in ("error", "confidence"):
        found = ensemble(weights=weights)(out, targets, batch)
        assert float(found.total) == pytest.approx(want, rel=1e-5)


def test_decoders_are_weighed_by_their_errors_along_the_transcript():
    out = random_output(LENS, batch=BATCH)
    needs = EnsembleKl.requires(EnsembleKl.Config(head="attention"))
    targets = {name: targets_like(out, needs, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    right = torch.nn.functional.one_hot(BATCH.tokens_BU, VOCAB_SIZE).float() * 20
    for name, scores in (("a", right), ("b", -right)):
        item = targets[name].items["token_logits:attention"]
        rows = torch.cat([scores, item.log_probs_BTK[:, -1:]], dim=1).log_softmax(-1)
        targets[name].items["token_logits:attention"] = Posteriors(rows, item.lens_B)
    best = ensemble(head="attention", weights="error", best=True)(out, targets, BATCH)
    assert float(best.total) == pytest.approx(kl_of(out, targets["a"], head="attention"), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": "fixed"}, "go together"), ({"fixed": {"a": 1}}, "go together"),
     ({"best": True}, "chooses by"), ({"weights": "fixed", "fixed": {"a": 0, "b": 1}}, "above 0")],
)  # fmt: skip
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleKl.Config(**options)


def test_fixed_weights_name_the_teachers():
    with pytest.raises(RecipeError, match="'c' is named, but no teacher"):
        ensemble(weights="fixed", fixed={"a": 1, "b": 1, "c": 2})
    with pytest.raises(RecipeError, match="'b' is a teacher without a weight"):
        ensemble(weights="fixed", fixed={"a": 1})


class Both:
    """Wants all teachers; keeps what it was given."""

    all_teachers = True

    def __init__(self, supervised=False):
        self.supervised = supervised
        self.seen = []

    def __call__(self, out, targets, batch):
        self.seen.append((dict(targets), batch))
        return LossOutput(out.logits["ctc"].sum(), len(batch))


def test_a_loss_gets_all_teachers_and_the_others_their_own(tmp_path):
    both, labelled = Both(), Both(supervised=True)
    terms = [
        Term("both", 1.0, both, all_teachers=("s", "t")),
        Term("labelled", 1.0, labelled, all_teachers=("s", "t")),
    ]
    toy_run(
        tmp_path,
        objective=Objective(terms),
        teachers={"s": ToyTeacher(), "t": ToyTeacher()},
        batches=toy_batches(6, labelled=[0, 1], duration_s=100.0),
        options=toy_options(epochs=1),
    )
    targets, batch = both.seen[-1]
    assert list(targets) == ["s", "t"]
    assert all(len(t.posteriors().lens_B) == len(batch) == 6 for t in targets.values())
    targets, batch = labelled.seen[-1]
    assert all(len(t.posteriors().lens_B) == len(batch) == 2 for t in targets.values())


def test_labels_of_terms_tell_them_apart():
    needs = [KlLoss.requires(KlLoss.Config(head=head)) for head in ("ctc", "ctc", "attention")]
    terms = [TermSection("kl", {}, 1.0, teacher) for teacher in ("a", "b", None)]
    assert labels_of(terms, needs) == ["kl:ctc@a", "kl:ctc@b", "kl:attention"]
    assert labels_of(terms[:1], needs[:1]) == ["kl"]
    assert labels_of([terms[2]] * 2, [needs[2]] * 2) == ["kl:attention"] * 2
