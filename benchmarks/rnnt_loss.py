"""Time and memory of transducer losses and of their distillation, forward and backward, joiner included.

    python benchmarks/rnnt_loss.py [--rounds 9] [--threads 1] [--only ours torchaudio] [--json]

Every row runs in processes of its own, from the same two sides of the joiner, on a CPU. ``peak`` is the
process's largest resident memory (VmHWM); ``above imports`` is that less the same figure after all
imports (those of an optimiser, too, since training has one), before the first tensor: inputs,
parameters, gradients, torch's kernels as they are first used, and all that the steps need. ``in use``
is the same difference in a second process whose allocator gives back at once what is freed (glibc's
MALLOC_MMAP_THRESHOLD_): without what it holds in reserve, which differs from run to run. That one is
not timed.

The rows: torchaudio's loss on all (frame, position) pairs; k2's smoothed and pruned losses as icefall calls
them, where k2 is installed; ours, pruned; ours with distillation (``rnnt`` and ``rnnt_kl``); the same
distillation at all pairs, by our losses (``full: true``) and written down plainly in torch.
B utterances, T frames, U tokens, P = U + 1 positions, V vocabulary, J joiner's width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from kdrecipe.interfaces import (
    Batch,
    Lattice,
    LatticePosteriors,
    LossSetup,
    ModelInfo,
    ModelOutput,
    Targets,
)
from kdrecipe.lattice import three_classes
from kdrecipe.lattice.paths import lattice_log_likelihood
from kdrecipe.model.heads.rnnt import RnntLoss, RnntLossOptions
from kdrecipe_plugins.losses.transducer import RnntKlLoss

RANGE, SIMPLE_SCALE, LM_SCALE = 5, 0.5, 0.25


class Case:
    """Inputs, the same for each row, and what each row computes of them (a scalar)."""

    def __init__(self, shape: argparse.Namespace, device: str = "cpu") -> None:
        torch.manual_seed(0)
        b, t, u, v, j = shape.batch, shape.frames, shape.tokens, shape.vocab, shape.dim
        with torch.device(device):
            self.encoder_BTJ = torch.randn(b, t, j, requires_grad=True)
            self.predictor_BPJ = torch.randn(b, u + 1, j, requires_grad=True)
            self.output, self.simple_am, self.simple_lm = (nn.Linear(j, v) for _ in range(3))
            self.tokens_BU = torch.randint(1, v, (b, u))
            self.lens_B, self.token_lens_B = torch.full((b,), t), torch.full((b,), u)
            self.teacher_BTP2 = torch.randn(b, t, u + 1, 3).log_softmax(-1)[..., :2].contiguous()
        self.info = ModelInfo("bench", v, 0.04, {"rnnt": ("rnnt_lattice",)}, {})

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self.output(torch.tanh(encoder + predictor))

    def clear(self) -> None:
        leaves = [self.encoder_BTJ, self.predictor_BPJ]
        for module in (self.output, self.simple_am, self.simple_lm):
            leaves += module.parameters()
        for leaf in leaves:
            leaf.grad = None

    # ------------------------------------------------------------ rows

    def torchaudio(self) -> Tensor:
        logits_BTPV = self.join(self.encoder_BTJ[:, :, None], self.predictor_BPJ[:, None])
        return self._torchaudio(logits_BTPV)

    def _torchaudio(self, logits_BTPV: Tensor) -> Tensor:
        tokens, lens, token_lens = (x.int() for x in (self.tokens_BU, self.lens_B, self.token_lens_B))
        return torchaudio.functional.rnnt_loss(
            logits_BTPV, tokens, lens, token_lens, blank=0, reduction="sum"
        )

    def k2(self) -> Tensor:
        import k2

        am_BTV, lm_BPV = self.simple_am(self.encoder_BTJ), self.simple_lm(self.predictor_BPJ)
        zeros_B = torch.zeros_like(self.lens_B)
        boundary_B4 = torch.stack([zeros_B, zeros_B, self.token_lens_B, self.lens_B], dim=1)
        simple, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
            lm=lm_BPV,
            am=am_BTV,
            symbols=self.tokens_BU,
            termination_symbol=0,
            lm_only_scale=LM_SCALE,
            am_only_scale=0.0,
            boundary=boundary_B4,
            reduction="sum",
            return_grad=True,
        )
        ranges_BTR = k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary_B4, RANGE)
        encoder_BTRJ, predictor_BTRJ = k2.do_rnnt_pruning(self.encoder_BTJ, self.predictor_BPJ, ranges_BTR)
        pruned = k2.rnnt_loss_pruned(
            self.join(encoder_BTRJ, predictor_BTRJ),
            self.tokens_BU,
            ranges_BTR,
            0,
            boundary_B4,
            reduction="sum",
        )
        return pruned + SIMPLE_SCALE * simple

    def _ours(self, distil: bool, full: bool) -> Tensor:
        lattice = Lattice(
            self.simple_am(self.encoder_BTJ),
            self.simple_lm(self.predictor_BPJ),
            self.encoder_BTJ,
            self.predictor_BPJ,
            self.tokens_BU,
            self.lens_B,
            self.token_lens_B,
            self.join,
        )
        out = ModelOutput(self.encoder_BTJ, self.lens_B, lattices={"rnnt": lattice})
        labelled_B = torch.ones_like(self.lens_B, dtype=torch.bool)
        batch = Batch([], self.encoder_BTJ, self.lens_B, self.tokens_BU, self.token_lens_B, labelled_B)
        teacher = LatticePosteriors(self.teacher_BTP2, self.lens_B, self.token_lens_B)
        targets = Targets({"rnnt_lattice:rnnt": teacher}, self.tokens_BU, self.token_lens_B)
        setup = LossSetup(self.info, self.info)
        rnnt = RnntLossOptions(range=RANGE, simple_scale=SIMPLE_SCALE, lm_scale=LM_SCALE, full=full)
        total = RnntLoss(rnnt, setup)(out, targets, batch).total
        if distil:
            rnnt_kl = RnntKlLoss.Config(range=RANGE, full=full)
            total = total + RnntKlLoss(rnnt_kl, setup)(out, targets, batch).total
        return total

    def ours(self) -> Tensor:
        return self._ours(distil=False, full=False)

    def ours_distilled(self) -> Tensor:
        return self._ours(distil=True, full=False)

    def full_distilled(self) -> Tensor:
        return self._ours(distil=True, full=True)

    def plain_distilled(self) -> Tensor:
        log_probs_BTPV = self.join(self.encoder_BTJ[:, :, None], self.predictor_BPJ[:, None]).log_softmax(-1)
        next_BTP1 = F.pad(self.tokens_BU, (0, 1))[:, None, :, None].expand(*log_probs_BTPV.shape[:3], 1)
        next_BTP = log_probs_BTPV.gather(-1, next_BTP1)[..., 0]
        log_q_BTP2 = torch.stack([next_BTP, log_probs_BTPV[..., 0]], dim=-1)
        ll_B = lattice_log_likelihood(
            log_q_BTP2[..., 0].transpose(1, 2),
            log_q_BTP2[..., 1].transpose(1, 2),
            self.lens_B,
            self.token_lens_B,
        )
        log_p_BTU3 = three_classes(self.teacher_BTP2[:, :, :-1])
        log_q_BTU3 = three_classes(log_q_BTP2[:, :, :-1])
        kl = F.kl_div(log_q_BTU3, log_p_BTU3, reduction="sum", log_target=True)
        return kl / self.predictor_BPJ.shape[1] - ll_B.sum()


ROWS: dict[str, tuple[str, Callable[[Case], Tensor]]] = {
    "torchaudio": ("torchaudio `rnnt_loss`, all pairs", Case.torchaudio),
    "k2": ("k2, pruned", Case.k2),
    "ours": ("`rnnt`, pruned", Case.ours),
    "ours+kl": ("`rnnt` + `rnnt_kl`, pruned", Case.ours_distilled),
    "full+kl": ("`rnnt` + `rnnt_kl`, `full: true`", Case.full_distilled),
    "plain+kl": ("the same in plain torch, all pairs", Case.plain_distilled),
}


def peak_mb() -> float:
    """The largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads VmHWM from /proc/self/status, which only Linux has")


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One row, in this process."""
    torch.set_num_threads(options.threads)
    if name == "k2":
        import k2  # noqa: F401
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # as in training; making one imports torch._dynamo
    imported_mb = peak_mb()
    case, took, worked = Case(options), [], []
    for _ in range(options.rounds + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        ROWS[name][1](case).backward()
        took.append(time.perf_counter() - start)
        worked.append(time.process_time() - cpu_start)
        case.clear()
    peak = peak_mb()
    return {
        "seconds": statistics.median(took[1:]),
        "cpu_seconds": statistics.median(worked[1:]),
        "peak_mb": peak,
        "above_imports_mb": peak - imported_mb,
    }


def in_process(name: str, more: list[str], **environment: str) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--row", name]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each row, after one more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows")
    for name, value in (("batch", 8), ("frames", 200), ("tokens", 30), ("vocab", 500), ("dim", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    found = {}
    for name in options.only:
        if name != "k2" or importlib.util.find_spec("k2"):
            found[name] = in_process(name, [])
            frugal = in_process(name, ["--rounds", "1"], MALLOC_MMAP_THRESHOLD_="131072")
            found[name]["in_use_mb"] = frugal["above_imports_mb"]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "options": vars(options), "rows": found}, indent=2))
        return
    print(
        f"torch {torch.__version__}; B={options.batch} T={options.frames} U={options.tokens} "
        f"V={options.vocab} J={options.dim}, {options.threads} thread(s), median of {options.rounds}\n\n"
        "| loss | seconds | CPU seconds | peak MB | above imports MB | in use MB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, row in found.items():
        times = f"{row['seconds']:.3f} | {row['cpu_seconds']:.3f}"
        memory = f"{row['peak_mb']:.0f} | {row['above_imports_mb']:.0f} | {row['in_use_mb']:.0f}"
        print(f"| {ROWS[name][0]} | {times} | {memory} |")


if __name__ == "__main__":
    main()
