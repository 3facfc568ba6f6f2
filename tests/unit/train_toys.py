"""A toy recogniser and toy data for the tests of the training loop; also run as a script by them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from kdrecipe.data.batches import CutBatches
from kdrecipe.interfaces import LossOutput, Posteriors, Targets
from kdrecipe.model.asr import AsrModel, FeatureNorm
from kdrecipe.model.heads.ctc import CtcHead, CtcHeadOptions, CtcLoss, CtcLossOptions
from kdrecipe.recipe.sections import SpecAugment, Training
from kdrecipe.train.loop import Objective, Term, train
from kdrecipe_plugins.architectures.conformer import Conformer

NUM_BINS = 16
LETTERS = "ABCDE"


@dataclass
class ToyCut:
    """An utterance whose letters can be read off its features."""

    id: str
    text: str
    seed: int
    has_features: bool = True

    @property
    def duration(self):
        return 0.12 * len(self.text)

    @property
    def supervisions(self):
        return [SimpleNamespace(text=self.text)]

    @property
    def features(self):
        return SimpleNamespace(load=self.load_features)

    def load_features(self):
        rng = np.random.default_rng(self.seed)
        rows = []
        for letter in self.text:
            pattern = np.zeros(NUM_BINS)
            pattern[3 * LETTERS.index(letter) : 3 * LETTERS.index(letter) + 3] = 4.0
            rows += [pattern] * 9 + [np.zeros(NUM_BINS)] * 3
        return (np.array(rows) + 0.3 * rng.standard_normal((len(rows), NUM_BINS))).astype(np.float32)


class ToyTokens:
    vocab_id = "toy"

    def __len__(self):
        return len(LETTERS) + 3

    def encode(self, text):
        return [LETTERS.index(letter) + 3 for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 3] for i in ids)


def toy_cuts(number=18, seed=0):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(LETTERS), size=rng.integers(3, 8))) for _ in range(number)]
    return [ToyCut(f"c{i}", text, seed * 1000 + i) for i, text in enumerate(texts)]


def toy_batches(number=18, *, labelled=None, seed=0, duration_s=3.0):
    cuts = toy_cuts(number, seed)
    ids = None if labelled is None else {f"c{i}" for i in labelled}
    return CutBatches(cuts, ToyTokens(), batch_duration_s=duration_s, seed=7, labelled_ids=ids)


def toy_model(dropout=0.1, seed=0):
    torch.manual_seed(seed)
    config = Conformer.Config(
        num_layers=1, dim=16, num_heads=2, ff_dim=16, kernel_size=3, front_channels=4, dropout=dropout
    )
    encoder = Conformer(config, NUM_BINS)
    head = CtcHead(CtcHeadOptions(), encoder.output_dim, len(ToyTokens()))
    return AsrModel(encoder, {"ctc": head}, FeatureNorm.from_stats(np.full(NUM_BINS, 0.5), np.ones(NUM_BINS)))


class Calm:
    """Mean square of the logits; counts frames, needs no labels."""

    def __call__(self, out, targets, batch):
        valid_BT = torch.arange(out.logits["ctc"].shape[1]) < out.lens_B[:, None]
        total = (out.logits["ctc"].square().mean(-1) * valid_BT).sum()
        return LossOutput(total, out.lens_B.sum(), {"frames": out.lens_B.sum()})


class Imitate(nn.Module):
    """Cross-entropy to the teacher through a learnt scale; counts frames."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, out, targets, batch):
        wanted = targets.posteriors("ctc")
        valid_BT = torch.arange(wanted.log_probs_BTK.shape[1]) < wanted.lens_B[:, None]
        log_probs = (out.logits["ctc"] * self.scale).log_softmax(-1)
        total = -((wanted.log_probs_BTK.exp() * log_probs).sum(-1) * valid_BT).sum()
        return LossOutput(total, wanted.lens_B.sum())


class Offset(nn.Module):
    """Pulls the logits of labelled utterances to what it learns; has a weight that it does not use."""

    supervised = True

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, out, targets, batch):
        return LossOutput((out.logits["ctc"][:, 0].sum(-1) - 1 - self.offset).square().sum(), len(batch))


class ToyTeacher:
    """A live teacher; remembers the features that it was shown."""

    def __init__(self):
        self.model = toy_model(dropout=0.0, seed=99).eval()
        self.seen = []

    @torch.no_grad()
    def targets(self, batch):
        self.seen.append(batch)
        out = self.model(batch.features_BTF, batch.lens_B)
        return Targets({"frame_logits:ctc": Posteriors(out.logits["ctc"].log_softmax(-1), out.lens_B)})


def ctc():
    return CtcLoss(CtcLossOptions())


def toy_objective():
    return Objective(
        [Term("ctc", 0.7, ctc()), Term("calm", 0.1, Calm()), Term("imitate", 0.3, Imitate(), "t")]
    )


def toy_options(**changes):
    given = {
        "epochs": 3,
        "batch_duration_s": 3.0,
        "lr": 5e-3,
        "precision": "fp32",
        "log_every": 2,
        "flat_start": 0,
        "checkpoint_every_s": 1e-9,
        "spec_augment": SpecAugment(num_freq_masks=1, freq_width=4, num_time_masks=2),
        **changes,
    }
    return Training(**given)


def toy_run(work_dir, *, model=None, batches=None, objective=None, options=None, teachers=None, **more):
    """Train the toy; returns (model, result)."""
    model = model or toy_model()
    result = train(
        model,
        batches or toy_batches(labelled=range(0, 18, 2)),
        objective or toy_objective(),
        {"t": ToyTeacher()} if teachers is None else teachers,
        options or toy_options(),
        Path(work_dir),
        seed=5,
        dev=more.pop("dev", None),
        progress=more.pop("progress", False),
        **more,
    )
    return model, result


def killed_at(work_dir, step):
    """Train, and be killed after ``step`` without a chance to tidy up."""

    def kill(model, done, num_steps):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    toy_run(work_dir, on_step=kill)


class Halt(Exception):
    pass


def one_of_several(work_dir, out, shard="no"):
    """Train as ``torchrun`` would have it, halted once; the first process writes the weights."""

    def halt(step, **_):
        if step == 4:
            raise Halt
        return []

    with contextlib.suppress(Halt):
        toy_run(work_dir, **distributed_settings(accumulate=1, shard=shard == "shard"), train_metrics=halt)
    settings = distributed_settings(accumulate=1, shard=shard == "shard")
    model, result = toy_run(work_dir, **settings)
    assert result.steps > 4
    if int(os.environ["RANK"]) == 0:
        torch.save([model.state_dict(), settings["objective"].module.state_dict()], out)


def distributed_settings(accumulate, shard=False):
    """Labels so few that some processes have none in some steps; an epoch ends with one batch for both."""
    terms = toy_objective().terms
    return {
        "objective": Objective([*terms, Term("offset", 0.2, Offset())]),
        "model": toy_model(dropout=0.0),
        "batches": toy_batches(labelled=[0, 1, 2]),
        "dev": toy_batches(4, seed=1),
        "options": toy_options(
            accumulate=accumulate,
            spec_augment=None,
            epochs=2,
            shard=shard,
            optimizer="adamw",
        ),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": lambda a, b: killed_at(a, int(b)), "rank": one_of_several}[sys.argv[1]](*sys.argv[2:])
