"""Training on a GPU: speed beside the device's matrix rate, what distillation costs, transducer losses.

    benchmarks/gpu.sh [--out FILE]

Prints a Markdown page. Steps are those of the training loop (``kdrecipe.train.step``): features to the
device, SpecAugment, forward in bf16, loss, backward, clipping, update; batches are made beforehand.
On a CPU (``DEVICE=cpu``) all sizes shrink to toys: a dry run, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import rnnt_loss
import soundfile
import torch
from lhotse.audio import Recording
from lhotse.cut import CutSet
from train_speed import (
    FORMULA,
    Shape,
    forward_flops,
    matrix_rate,
    our_encoder,
    random_batch,
    seconds,
    with_ctc,
)

from kdrecipe.interfaces import SAMPLE_RATE, Batch, LossSetup
from kdrecipe.model.asr import AsrModel, model_info
from kdrecipe.model.heads.ctc import CtcLoss, CtcLossOptions
from kdrecipe.recipe.sections import SpecAugment, Training
from kdrecipe.targets import TargetSource
from kdrecipe.targets.cache import write_targets
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.train.distribution import Workers
from kdrecipe.train.objective import Objective, Term
from kdrecipe.train.optimisation import make_optimizer
from kdrecipe.train.step import Stepper
from kdrecipe_plugins.losses.kl import KlLoss

DROPOUT = 0.1


@dataclass(frozen=True)
class Sizes:
    """What is measured: a GPU's sizes, or toys for a dry run.

    Args:
        shapes: Conformers by name; of the last two, the larger teaches the smaller.
        utterances: in a batch.
        duration_s: of each utterance.
        rounds: timed steps of each row, after a few more.
        matrix: rows and columns of the matrix product.
        lattice: batch, frames, tokens, vocabulary and joiner's width of the transducer losses.
    """

    shapes: Mapping[str, Shape]
    utterances: int
    duration_s: int
    rounds: int
    matrix: int
    lattice: tuple[int, int, int, int, int]


GPU = Sizes(
    {
        "3 M": Shape(layers=6, dim=144, vocab=500),
        "20 M": Shape(layers=13, dim=256, vocab=500),
        "100 M": Shape(layers=17, dim=512, heads=8, vocab=500),
    },
    utterances=48,
    duration_s=12,
    rounds=20,
    matrix=8192,
    lattice=(32, 300, 60, 500, 512),
)
DRY = Sizes(
    {
        "toy 1": Shape(layers=1, dim=16, heads=2, vocab=20, channels=4),
        "toy 2": Shape(layers=2, dim=16, heads=2, vocab=20, channels=4),
        "toy 3": Shape(layers=2, dim=32, heads=2, vocab=20, channels=4),
    },
    utterances=2,
    duration_s=1,
    rounds=2,
    matrix=256,
    lattice=(2, 20, 5, 20, 16),
)


class Bench:
    """A device, the sizes that suit it, and a folder for what is written on the way."""

    def __init__(self, device: str, work_dir: Path) -> None:
        self.device = device
        self.work_dir = work_dir
        self.sizes = DRY if device == "cpu" else GPU
        self.batch = random_batch(
            self.sizes.shapes[self.names[0]], self.sizes.utterances, self.sizes.duration_s
        )

    @property
    def names(self) -> list[str]:
        """Of the shapes, from the smallest."""
        return list(self.sizes.shapes)

    @property
    def audio_s(self) -> int:
        """Audio in a batch."""
        return self.sizes.utterances * self.sizes.duration_s

    def model(self, name: str) -> AsrModel:
        """A Conformer with a CTC head on the device; the same weights each time."""
        torch.manual_seed(0)
        shape = self.sizes.shapes[name]
        return with_ctc(our_encoder(shape, DROPOUT), shape).to(self.device)

    def step_s(
        self, model: AsrModel, terms: Sequence[Term], teachers: Mapping[str, TargetSource]
    ) -> tuple[float, str]:
        """As :meth:`time`, of a training step."""
        objective = Objective(terms)
        # noise teaches nothing; it must not diverge
        options = Training(precision="bf16", lr=1e-5, spec_augment=SpecAugment())
        workers = Workers(0, 1, torch.device(self.device))
        optimizer = make_optimizer(model.train(), objective.module.parameters(), options)
        stepper = Stepper(model, objective, teachers, optimizer, options, workers, 0, self.work_dir)
        return self.time(lambda step: stepper.run([self.batch], step))

    def time(self, work: Callable[[int], object]) -> tuple[float, str]:
        """Median seconds of ``work(number)``, and the GPU's peak memory in GiB ('' on a CPU)."""
        warm_up = 1 if self.device == "cpu" else 5
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        took = [seconds(partial(work, n), self.device) for n in range(1, warm_up + self.sizes.rounds + 1)]
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if self.device != "cpu" else ""
        return statistics.median(took[warm_up:]), peak

    # ------------------------------------------------------------ tables

    def heading(self) -> list[str]:
        """What was measured, on what, when."""
        name = torch.cuda.get_device_name() if self.device != "cpu" else platform.processor() or "CPU"
        lines = [f"## {name}, torch {torch.__version__}, {datetime.date.today().isoformat()}", ""]
        if self.device == "cpu":
            lines += ["**A dry run on a CPU with toy sizes: its figures mean nothing.**", ""]
        return lines

    def training(self) -> list[str]:
        """Rows of training speed beside the matrix rate."""
        rate = matrix_rate(torch.bfloat16, self.sizes.matrix, self.device)
        size, batch = self.sizes.matrix, f"{self.sizes.utterances} x {self.sizes.duration_s} s"
        lines = [
            f"Training in bf16 on CTC, dropout {DROPOUT}, SpecAugment, batches of {batch}, median of "
            f"{self.sizes.rounds} steps. Matrix product of {size} x {size} in bf16: "
            f"{rate / 1e12:.3g} TFLOP/s.",
            "",
            "| Conformer | parameters | step, ms | audio s per s | of matrix rate | peak GiB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, shape in self.sizes.shapes.items():
            model = self.model(name)
            took, peak = self.step_s(model, [ctc()], {})
            share = 3 * forward_flops(shape, self.sizes.utterances, self.sizes.duration_s) / took / rate
            count = sum(p.numel() for p in model.parameters()) / 1e6
            lines.append(
                f"| {name}: {shape.layers} x {shape.dim} | {count:.1f} M | {1000 * took:.1f} "
                f"| {self.audio_s / took:.0f} | {share:.1%} | {peak} |"
            )
        return [*lines, "", "```", FORMULA, "```", ""]

    def distillation(self) -> list[str]:
        """Rows of a step with a teacher, cached and live, over one without."""
        small, large = self.names[-2:]
        student = self.model(small)
        plain, plain_peak = self.step_s(student, [ctc()], {})
        rows = [("no teacher", plain, plain_peak)]
        teacher = self.model(large)
        setup = LossSetup(model_info(student, "bench"), model_info(teacher, "bench"))
        both = [replace(ctc(), weight=0.5), Term("kl", 0.5, KlLoss(KlLoss.Config(), setup), "teacher")]
        specs = KlLoss.requires(KlLoss.Config())
        cached = write_targets(
            self.cuts(),
            OneBatch(self.batch),
            ModelTeacher(teacher),
            specs,
            self.work_dir / "targets",
            key_parts={},
            device=self.device,
        )
        rows.append(("cached, all classes", *self.step_s(student, both, {"teacher": cached})))
        live = LiveTargets(ModelTeacher(teacher), specs)
        rows.append(("live", *self.step_s(student, both, {"teacher": live})))
        return [
            f"Distillation (`ctc` and `kl`) of the {small} Conformer from that of {large}, same batches:",
            "",
            "| teacher's targets | step, ms | over plain training | peak GiB |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {what} | {1000 * t:.1f} | {t / plain:.2f} | {peak} |" for what, t, peak in rows),
            "",
        ]

    def cuts(self) -> CutSet:
        """Cuts under the batch's ids, all of one file of silence: the cache identifies its audio."""
        path = self.work_dir / "silence.wav"
        soundfile.write(path, np.zeros(self.sizes.duration_s * SAMPLE_RATE, dtype=np.float32), SAMPLE_RATE)
        recordings = [Recording.from_file(path, recording_id=name) for name in self.batch.ids]
        return CutSet.from_cuts([r.to_cut().with_id(r.id) for r in recordings])

    def transducers(self) -> list[str]:
        """Rows of transducer losses, forward and backward, joiner included."""
        keys = ("batch", "frames", "tokens", "vocab", "dim")
        shape = argparse.Namespace(**dict(zip(keys, self.sizes.lattice, strict=True)))
        lines = [
            "Transducer losses in fp32, forward and backward, joiner included, "
            + " ".join(f"{name}={value}" for name, value in vars(shape).items())
            + ":",
            "",
            "| loss | ms | over torchaudio | peak GiB |",
            "| --- | ---: | ---: | ---: |",
        ]
        theirs = None
        for key, (what, loss) in rnnt_loss.ROWS.items():
            if key == "k2":
                continue
            try:
                case = rnnt_loss.Case(shape, self.device)
                took, peak = self.time(lambda _, case=case, loss=loss: (loss(case).backward(), case.clear()))
            except RuntimeError as error:  # out of memory, or not built for this device
                lines.append(f"| {what} | {str(error).splitlines()[0]:.80} | | |")
                continue
            theirs = took if key == "torchaudio" else theirs
            ratio = f"{took / theirs:.2f}" if theirs else ""
            lines.append(f"| {what} | {1000 * took:.1f} | {ratio} | {peak} |")
        return [*lines, ""]


class OneBatch:
    """One batch as :func:`kdrecipe.targets.cache.write_targets` reads batches."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def epoch(self, number: int) -> list[list[str]]:
        """All utterances at once."""
        return [self.batch.ids]

    def load(self, ids: Sequence[str]) -> Batch:
        """The batch."""
        return self.batch


def ctc() -> Term:
    """The supervised loss."""
    return Term("ctc", 1.0, CtcLoss(CtcLossOptions()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the page here, too")
    options = parser.parse_args()
    device = os.environ.get("DEVICE", "cuda")
    with tempfile.TemporaryDirectory() as work_dir:
        bench = Bench(device, Path(work_dir))
        page: list[str] = []
        for part in (bench.heading, bench.training, bench.distillation, bench.transducers):
            lines = part()
            print("\n".join(lines), flush=True)
            page += lines
    if options.out:
        options.out.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
