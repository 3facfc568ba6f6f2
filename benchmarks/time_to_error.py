"""CPU-seconds until a system's dev token error is below 50, 20, 15, 10 %: the speed that users feel.

    AN4_ROOT=/data/an4 kdrecipe run an4/ctc_kd --work DIR --stop-stage 4
    AN4_ROOT=/data/an4 python benchmarks/time_to_error.py an4/ctc_kd --work DIR --system teacher \\
        --variants now before --seeds 1 2 3 4 5 --limit-s 900

Trains one system as the recipe has it and as each variant changes it, in turn, seed by seed; each run
is a process of one thread. A time is CPU time of that process, evaluations included, from the first
step to the end of the first epoch with a dev error (of the weights that would be kept) below the level.
A run ends below the lowest level or at the limit; what it had not reached counts as beyond the limit.

Variants change one thing each: the optimiser (``scaled_adam`` is icefall's, with Eden;
``schedule_free`` needs ``pip install schedulefree``) or what may get training off CTC's plateau of
blanks; those of ``kl`` are for distilled systems. ``before`` is AdamW with a cosine over a fixed number
of epochs, SpecAugment from the first step, and CR-CTC in teachers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

LEVELS = (0.5, 0.2, 0.15, 0.1)
ROOT = Path(__file__).parents[1]


class Enough(Exception):
    """Raised out of a training run that has taken as long as it may, or is good enough."""


# ---------------------------------------------------------------- optimisers of others


class ScaledAdam(Optimizer):
    """icefall's optimiser (Yao et al. 2024, arXiv 2310.11230, section 4) and its schedule Eden.

    Adam's update of each tensor times the tensor's root mean square, and a learnt scale of the tensor.
    Scalars and vectors count as tensors; the floor of the root mean square is 1e-5.
    """

    def __init__(self, params: Any, lr: float = 0.045, lr_steps: float = 500.0, warmup: int = 200) -> None:
        super().__init__(params, {"lr": lr})
        self.lr_steps, self.warmup, self.count = lr_steps, warmup, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        eden = ((self.count / self.lr_steps) ** 2 + 1) ** -0.25 * min(
            1.0, 0.5 + 0.5 * self.count / self.warmup
        )
        for group in self.param_groups:
            lr = group["initial_lr"] * eden
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, lr)

    def _update(self, p: nn.Parameter, lr: float) -> None:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if not state:
            state.update(delta=torch.zeros_like(p), square=torch.zeros_like(p), scale_square=0.0)
        rms = p.square().mean().sqrt().clamp(1e-5, 3.0)
        correction = 1 - 0.98**self.count
        if p.numel() > 1:  # the scale: gradient of the loss by log(scale), sizes of Adam
            slope = float((p * gradient).sum())
            state["scale_square"] = 0.98 * state["scale_square"] + 0.02 * slope**2
            grow = -0.1 * lr * slope / (math.sqrt(state["scale_square"] / correction) + 1e-8)
        else:
            grow = 0.0
        state["square"].mul_(0.98).addcmul_(gradient, gradient, value=0.02)
        update = gradient / ((state["square"] / correction).sqrt() + 1e-8)
        state["delta"].mul_(0.9).add_(-lr * (update * rms) + grow * p, alpha=0.1)
        p.add_(state["delta"])


def scaled_adam(params: list[dict[str, Any]], config: Any) -> Optimizer:
    return ScaledAdam([{"params": group["params"]} for group in params])


def schedule_free(params: list[dict[str, Any]], config: Any) -> Optimizer:
    """AdamW of Defazio et al. 2024 (arXiv 2405.15682)."""
    import schedulefree  # type: ignore[import-not-found]

    optimizer: Optimizer = schedulefree.AdamWScheduleFree(
        params, lr=config.lr, betas=(0.9, 0.98), warmup_steps=100
    )
    return optimizer


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe.

    Args:
        sets: as for ``--set``, ``{system}`` standing for the system's own section.
        teacher: more of them for a system without a teacher.
        optimizer: in place of the recipe's.
        prepare: changes model and batches before training.
    """

    sets: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    optimizer: Callable[..., Optimizer] | None = None
    prepare: Callable[[nn.Module, Any], None] | None = None


def _rare_blank(model: nn.Module, batches: Any) -> None:
    """The blank begins e^3 times less likely than it would."""
    with torch.no_grad():
        model.heads["ctc"].proj.bias[0] -= 3.0  # type: ignore[union-attr, index]


def _short_first(model: nn.Module, batches: Any) -> None:
    """The first epoch goes from the shortest utterances to the longest."""
    plan = batches.epoch
    length = batches.duration_s
    batches.epoch = lambda n: plan(n) if n else sorted(plan(n), key=lambda ids: length(ids) / len(ids))


def _kl(option: str) -> Variant:
    """A distilled system with CTC and KL at even weights, and an option of ``kl``."""
    return Variant(
        (f"{{system}}.losses=[{{{{name: ctc, weight: 0.5}}}}, {{{{name: kl, weight: 0.5, {option}}}}}]",)
    )


_TRAINING = "{system}.training."
_MASKS_AT_ONCE = (_TRAINING + "spec_augment.start_below=null",)
VARIANTS = {
    "now": Variant(),
    "before": Variant(
        (
            *_MASKS_AT_ONCE,
            *(_TRAINING + text for text in ("optimizer=adamw", "schedule=cosine", "average=false")),
            _TRAINING + "flat_start=0",
            *(_TRAINING + text for text in ("lr=0.002", "epochs=16", "warmup_steps=280")),
        ),
        (
            "{system}.losses=[{{name: ctc}}, {{name: cr_ctc, weight: 1.0}}]",
            "{system}.model.dropout=0.2",
            *(_TRAINING + text for text in ("lr=0.0015", "epochs=22", "warmup_steps=390")),
            _TRAINING + "spec_augment.max_time_fraction=0.3",
        ),
    ),
    "no_flat_start": Variant((_TRAINING + "flat_start=0",)),
    "adamw": Variant((_TRAINING + "optimizer=adamw", _TRAINING + "lr=0.002")),
    "scaled_adam": Variant((_TRAINING + "schedule=constant", _TRAINING + "warmup_steps=0"), (), scaled_adam),
    "schedule_free": Variant(
        (
            _TRAINING + "schedule=constant",
            _TRAINING + "warmup_steps=0",
            _TRAINING + "average=false",
            _TRAINING + "lr=0.003",
        ),
        (),
        schedule_free,
    ),
    "masks_at_once": Variant(_MASKS_AT_ONCE),
    "light_masks_at_once": Variant(
        (
            *_MASKS_AT_ONCE,
            _TRAINING + "spec_augment.freq_width=10",
            _TRAINING + "spec_augment.num_time_masks=2",
            _TRAINING + "spec_augment.time_width=25",
        )
    ),
    "no_masks": Variant((_TRAINING + "spec_augment=null",)),
    "cr_ctc_at_once": Variant(
        (*_MASKS_AT_ONCE, "{system}.losses=[{{name: ctc}}, {{name: cr_ctc, weight: 1.0, start_below: null}}]")
    ),
    "cr_ctc": Variant(("{system}.losses=[{{name: ctc}}, {{name: cr_ctc, weight: 1.0}}]",)),
    "kl_later": _kl("start_below: 0.5"),
    "kl_select": _kl("blank: select"),
    "kl_weight": _kl("blank: weight"),
    "rare_blank": Variant((), (), None, _rare_blank),
    "short_first": Variant((), (), None, _short_first),
}


# ---------------------------------------------------------------- one run


def measure(args: argparse.Namespace, variant: Variant, seed: int) -> dict[str, Any]:
    """Train once; the curve is (steps, CPU-seconds, dev token error) of each epoch."""
    from kdrecipe.model.asr import model_info
    from kdrecipe.recipe.load import load_recipe
    from kdrecipe.stages.layout import Layout
    from kdrecipe.stages.session import Session
    from kdrecipe.train.loop import train

    torch.set_num_threads(1)
    path = args.recipe if args.recipe.exists() else ROOT / "recipes" / args.recipe
    plain = load_recipe(path, overrides=args.set).systems[args.system]
    section = f"systems.{args.system}.{'distill' if plain.teachers else 'train'}"
    sets = [*variant.sets, *(() if plain.teachers else variant.teacher)]
    recipe = load_recipe(path, overrides=[*args.set, *(text.format(system=section) for text in sets)])
    system, layout = recipe.systems[args.system], Layout(args.work)
    session = Session(recipe, layout, system, seed)
    model = session.new_model()
    batches = session.batches(system.training)
    if variant.prepare is not None:
        variant.prepare(model, batches)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        watch = Watch(log, args.limit_s, min(args.levels))

        def build(params: Any, config: Any) -> Optimizer | None:
            if variant.optimizer is None:
                return None
            optimizer = variant.optimizer(params, config)
            _follow_mode(model, optimizer)
            return optimizer

        with contextlib.suppress(Enough):
            train(
                model,
                batches,
                session.objective(model_info(model, session.tokens.vocab_id)),
                session.teachers(torch.device("cpu"), model),
                system.training,
                Path(folder),
                seed=seed,
                dev=session.dev,
                on_step=watch,
                progress=False,
                build_optimizer=build,
                device="cpu",
            )
        curve = watch.curve()
    return {"curve": curve}


def _follow_mode(model: nn.Module, optimizer: Optimizer) -> None:
    """Schedule-free weights differ between training and evaluation."""
    if hasattr(optimizer, "eval"):
        optimizer.train()  # type: ignore[attr-defined]
        plain = model.train

        def train_mode(mode: bool = True) -> nn.Module:
            getattr(optimizer, "train" if mode else "eval")()
            return plain(mode)

        model.train = train_mode  # type: ignore[method-assign]


class Watch:
    """CPU time at every step; ends a run that has had enough of it, or is below the lowest level."""

    def __init__(self, log: Path, limit_s: float, lowest: float) -> None:
        self.log, self.limit_s, self.lowest = log, limit_s, lowest
        self.began = time.process_time()
        self.at_step: dict[int, float] = {}

    def __call__(self, model: nn.Module, step: int, num_steps: int) -> None:
        self.at_step[step] = time.process_time() - self.began
        last = self._epochs()[-1:]
        if self.at_step[step] > self.limit_s or (last and last[0]["dev_ter"] < self.lowest):
            raise Enough

    def _epochs(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == "epoch"]

    def curve(self) -> list[tuple[int, float, float]]:
        """(steps, CPU-seconds, dev token error) at the end of each epoch, its evaluation included."""
        end = time.process_time() - self.began
        return [(e["step"], self.at_step.get(e["step"] + 1, end), e["dev_ter"]) for e in self._epochs()]


# ---------------------------------------------------------------- all runs, and the table


def reached(run: Mapping[str, Any], level: float) -> tuple[float, float]:
    """(steps, CPU-seconds) at the first dev error below ``level``; infinite if there was none."""
    return next(((n, t) for n, t, error in run["curve"] if error < level), (math.inf, math.inf))


def table(results: Mapping[str, Mapping[int, Any]], levels: Iterable[float], limit_s: float) -> str:
    """Medians over seeds, Markdown; what fewer than half of the seeds reached is beyond the limit."""
    levels = sorted(levels, reverse=True)
    heads = " | ".join(f"CPU s to {100 * level:g} %" for level in levels)
    lines = [f"| variant | seeds | steps to {100 * levels[0]:g} % | {heads} | seeds that got there |"]
    lines.append("|---|--:|--:|" + "--:|" * (len(levels) + 1))
    for name, by_seed in results.items():
        steps = statistics.median(reached(run, levels[0])[0] for run in by_seed.values())
        cells = ["–" if steps == math.inf else f"{steps:.0f}"]
        for level in levels:
            found = statistics.median(reached(run, level)[1] for run in by_seed.values())
            cells.append(f"> {limit_s:.0f}" if found == math.inf else f"{found:.0f}")
        there = sum(reached(run, levels[-1])[0] < math.inf for run in by_seed.values())
        lines.append(f"| {name} | {len(by_seed)} | {' | '.join(cells)} | {there} of {len(by_seed)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a recipe, as kdrecipe run takes it")
    parser.add_argument("--work", type=Path, required=True, help="its work directory, stages 0 to 2 (4) done")
    parser.add_argument("--system", default="teacher")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["now", "before"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--levels", nargs="+", type=float, default=list(LEVELS))
    parser.add_argument("--limit-s", type=float, default=900.0, help="CPU-seconds per run")
    parser.add_argument("--set", action="append", default=[], help="override for all variants")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="JSON of all curves; runs that are in it are not run again")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, VARIANTS[args.one[0]], int(args.one[1]))))
        return
    known: dict[str, dict[str, Any]] = (
        json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    )
    todo = [(v, s) for s in args.seeds for v in args.variants if str(s) not in known.get(v, {})]
    running: list[tuple[str, int, subprocess.Popen[str]]] = []
    while todo or running:
        while todo and len(running) < args.jobs:
            variant, seed = todo.pop(0)
            command = [sys.executable, *sys.argv, "--one", variant, str(seed)]
            running.append((variant, seed, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        variant, seed, process = next((r for r in running if r[2].poll() is not None), running[0])
        out, _ = process.communicate()
        running.remove((variant, seed, process))
        if process.returncode:
            raise SystemExit(f"{variant}, seed {seed}: failed")
        run = json.loads(out.splitlines()[-1])
        known.setdefault(variant, {})[str(seed)] = run
        errors = " ".join(f"{100 * error:.0f}" for *_, error in run["curve"])
        taken = f"{run['curve'][-1][1]:.0f} CPU s" if run["curve"] else "no epoch"
        print(f"{variant} seed {seed}: {errors} | {taken}", file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(known))
    results = {v: {s: known[v][str(s)] for s in args.seeds} for v in args.variants}
    print(table(results, args.levels, args.limit_s))


if __name__ == "__main__":
    main()
