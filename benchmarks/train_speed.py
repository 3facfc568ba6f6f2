"""How fast a small Conformer trains on this machine's CPU, and how near that is to its matrix rate.

    python benchmarks/train_speed.py [--threads 1 2] [--rounds 9] [--dropout 0 0.1]
    python benchmarks/train_speed.py --check-loss

A step is forward, CTC loss, backward and a fused AdamW update. The peer is torchaudio's Conformer
of the same shape behind the same front end and CTC head, timed in turn with ours. ``--check-loss``
trains in fp32 and bf16 from the same seeds and data and prints both losses.
B utterances, T frames, F bins, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchaudio
from torch import Tensor, nn

from kdrecipe.interfaces import Batch, Targets
from kdrecipe.model.asr import AsrModel, FeatureNorm
from kdrecipe.model.heads.ctc import CtcHead, CtcLoss
from kdrecipe_plugins.architectures.conformer import Conformer
from kdrecipe_plugins.architectures.layers import ConvFront

BINS = 80
BATCHES = ((20, 3), (10, 12))  # utterances, seconds each
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16: autocast, weights stay fp32
Key = tuple[str, str]  # model, precision
FORMULA = (
    "FLOPs of a step = 3 x forward (1 forward, 2 backward); forward, per output frame of 0.04 s:\n"
    "  layers * (8*D*FF + 8*D^2 + 4*T*D + 6*D^2 + 2*K*D)   feed-forwards, attention, convolution\n"
    "  + 2*9*C*(2*F/2) + 2*9*C*C*F/4 + 2*C*F/4*D + 2*D*V   front end and CTC head\n"
    "  (norms, activations, softmax, loss and optimiser are not counted)"
)


@dataclass(frozen=True)
class Shape:
    """A Conformer with a CTC head: L layers, D width, FF = 4 D, K kernel, V vocabulary, C channels."""

    layers: int = 6
    dim: int = 144
    heads: int = 4
    kernel: int = 15
    vocab: int = 64
    channels: int = 32

    @property
    def ff(self) -> int:
        """Width within the feed-forward modules."""
        return 4 * self.dim


SMALL = Shape()


class TorchaudioEncoder(nn.Module):
    """The peer: our front end, torchaudio's Conformer layers."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.front = ConvFront(BINS, shape.dim, shape.channels, dropout)
        self.layers = torchaudio.models.Conformer(
            shape.dim, shape.heads, shape.ff, shape.layers, shape.kernel, dropout=dropout
        )

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD, lens_B = self.layers(*self.front(features_BTF, lens_B))
        return hidden_BTD, lens_B


def our_encoder(shape: Shape, dropout: float) -> Conformer:
    """The Conformer that is measured."""
    config = Conformer.Config(
        num_layers=shape.layers,
        dim=shape.dim,
        num_heads=shape.heads,
        ff_dim=shape.ff,
        kernel_size=shape.kernel,
        front_channels=shape.channels,
        dropout=dropout,
    )
    return Conformer(config, BINS)


def with_ctc(encoder: nn.Module, shape: Shape) -> AsrModel:
    """The encoder under a CTC head."""
    return AsrModel(encoder, {"ctc": CtcHead(CtcHead.Config(), shape.dim, shape.vocab)}, FeatureNorm(BINS))


def forward_flops(shape: Shape, num_utterances: int, duration_s: int) -> float:
    """FLOPs of a forward pass, see FORMULA."""
    frames, dim = duration_s * 25, shape.dim
    layer = 8 * dim * shape.ff + 14 * dim**2 + 4 * frames * dim + 2 * shape.kernel * dim
    channels = shape.channels
    front = 18 * channels * BINS + 18 * channels**2 * BINS / 4 + channels * BINS / 2 * dim
    return num_utterances * frames * (shape.layers * layer + front + 2 * dim * shape.vocab)


def random_batch(shape: Shape, num_utterances: int, duration_s: int) -> Batch:
    """Noise with three tokens per second."""
    frames, tokens = duration_s * 100, duration_s * 3
    return Batch(
        ids=[str(i) for i in range(num_utterances)],
        features_BTF=torch.randn(num_utterances, frames, BINS),
        lens_B=torch.full((num_utterances,), frames),
        tokens_BU=torch.randint(1, shape.vocab, (num_utterances, tokens)),
        token_lens_B=torch.full((num_utterances,), tokens),
        labelled_B=torch.ones(num_utterances, dtype=torch.bool),
    )


class Trainer:
    """A model, its optimiser and the precision it runs in."""

    def __init__(self, encoder: nn.Module, bf16: bool, lr: float = 1e-3) -> None:
        self.model = with_ctc(encoder, SMALL)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr, fused=True)
        self.loss = CtcLoss(CtcLoss.Config())
        self.bf16 = bf16

    def step(self, batch: Batch) -> float:
        """One update; returns the loss per token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.model(batch.features_BTF, batch.lens_B)
            value = self.loss(out, Targets(), batch)
        loss = value.total / value.count
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock time of one call, until the device has done all of it."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> float:
    """FLOP/s of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def step_times(
    runs: dict[tuple[str, str], Trainer], batch: Batch, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each run's steps, taken in turn, so that what else the machine does hits all alike."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for round_ in range(rounds + 1):  # the first warms up
        for key, run in runs.items():
            took = seconds(partial(run.step, batch))
            if round_:
                times[key].append(took)
    return times


def measure(num_threads: int, rounds: int, dropout: float) -> None:
    """Print one block of rows: both batches, both precisions, ours and the peer in turn."""
    torch.set_num_threads(num_threads)
    rates = {name: matrix_rate(dtype) for name, dtype in PRECISIONS.items()}
    print(
        f"\n{num_threads} thread(s), dropout {dropout}; matrix product "
        + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
        + f"\n{'':34s}{'audio s per s':>16s}{'of matrix':>11s}{'faster than the peer, by round':>33s}"
        f"\n{'model':12s}{'precision':11s}{'batch':>11s}{'median':>9s}{'best':>7s}{'rate':>11s}"
        f"{'in fp32':>22s}{'in bf16':>11s}"
    )
    builders = {"ours": our_encoder, "torchaudio": TorchaudioEncoder}
    for num_utterances, duration_s in BATCHES:
        torch.manual_seed(0)
        batch = random_batch(SMALL, num_utterances, duration_s)
        runs = {
            (n, p): Trainer(builders[n](SMALL, dropout), p == "bf16") for n in builders for p in PRECISIONS
        }
        times = step_times(runs, batch, rounds)
        audio_s, flops = num_utterances * duration_s, 3 * forward_flops(SMALL, num_utterances, duration_s)
        for (name, precision), took in times.items():
            ratios = [
                statistics.median(b / a for a, b in zip(took, times["torchaudio", p], strict=True))
                for p in PRECISIONS
            ]
            print(
                f"{name:12s}{precision:11s}{f'{num_utterances} x {duration_s} s':>11s}"
                f"{audio_s / statistics.median(took):9.0f}{audio_s / min(took):7.0f}"
                f"{flops / min(took) / rates[precision]:11.0%}{ratios[0]:22.2f}{ratios[1]:11.2f}",
                flush=True,
            )


def synthetic_batch(patterns_VF: Tensor, generator: torch.Generator) -> Batch:
    """8 utterances of 4 tokens, each token a spectral pattern of 8 frames under noise."""
    batch = random_batch(SMALL, num_utterances=8, duration_s=1)
    batch.tokens_BU = torch.randint(1, len(patterns_VF), (8, 4), generator=generator)
    batch.token_lens_B = torch.full((8,), 4)
    clean = patterns_VF[batch.tokens_BU].repeat_interleave(8, dim=1)
    batch.features_BTF = clean + 0.5 * torch.randn(clean.shape, generator=generator)
    batch.lens_B = torch.full((8,), clean.shape[1])
    return batch


def learn(precision: str, seed: int, num_steps: int) -> list[float]:
    """Losses of a short training; the same seed gives the same weights and data in any precision."""
    torch.manual_seed(seed)
    run = Trainer(our_encoder(SMALL, 0.0), precision == "bf16")
    generator = torch.Generator().manual_seed(seed)
    patterns_VF = torch.randn(9, BINS, generator=generator)
    losses = []
    for step in range(num_steps):
        run.optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        losses.append(run.step(synthetic_batch(patterns_VF, generator)))
    return losses


def check_loss(num_steps: int, num_seeds: int) -> None:
    """Print the loss of both precisions along the way, and the mean of the last tenth."""
    tail = max(1, num_steps // 10)
    print(f"CTC loss per token on new synthetic data at each step; means over {tail} steps")
    ends: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in range(num_seeds):
        for precision in PRECISIONS:
            losses = learn(precision, seed, num_steps)
            means = [statistics.fmean(losses[i : i + tail]) for i in range(0, num_steps, tail)]
            ends[precision].append(means[-1])
            print(f"{precision} seed {seed}: " + " ".join(f"{x:.3f}" for x in means), flush=True)
    for precision, values in ends.items():
        spread = f" (seeds {min(values):.3f} to {max(values):.3f})"
        print(f"{precision} at the end: {statistics.fmean(values):.3f}{spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each row")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--check-loss", action="store_true", help="compare the precisions' losses instead")
    parser.add_argument("--steps", type=int, default=200, help="of --check-loss")
    parser.add_argument("--seeds", type=int, default=3, help="of --check-loss")
    options = parser.parse_args()
    if options.check_loss:
        torch.set_num_threads(options.threads[-1])
        check_loss(options.steps, options.seeds)
        return
    print(f"torch {torch.__version__}, torchaudio {torchaudio.__version__}\n{FORMULA}")
    for dropout in options.dropout:
        for num_threads in options.threads:
            measure(num_threads, options.rounds, dropout)


if __name__ == "__main__":
    main()
