"""Optimiser, learning-rate schedule, numerical precision, random state of a step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import Training

OptimizerHook = Callable[..., Optimizer | None]
"""``hook(params=groups, config=options)``; None leaves it to :func:`make_optimizer`."""


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], options: Training, hook: OptimizerHook | None = None
) -> Optimizer:
    """The plugin's optimiser, or else AdamW without weight decay on biases and norms."""
    trainable = [p for _, p in named if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = hook(params=groups, config=options) if hook else None
    if optimizer is None:
        # Fused: one pass over all weights instead of a dozen small operations for each tensor.
        optimizer = AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def lr_factor(step: int, num_steps: int, warmup: float, schedule: str) -> float:
    """Share of the highest learning rate at ``step`` (1-based) of ``num_steps``, never 0.

    Args:
        step: the step about to be done.
        num_steps: of the whole run.
        warmup: share of them in which the factor rises to 1.
        schedule: ``cosine``, ``linear`` (both fall towards 0), ``noam`` or ``constant``.
    """
    rising = max(1, round(warmup * num_steps))
    if step <= rising:
        return step / rising
    if schedule == "noam":
        return math.sqrt(rising / step)
    progress = (step - rising) / (num_steps - rising + 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Set the learning rate of every group to ``factor`` of its highest; returns the first's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Type of the matrix products in training; None for float32.

    ``auto`` is bf16 where the hardware multiplies in it: GPUs from Ampere on, CPUs with AMX or
    AVX512-BF16 (a Conformer of width 48 trains 1.1 times as fast there, of width 144 1.6 times). Older
    GPUs only emulate bf16, slower than float32: they get fp16. The choice depends on the machine
    only, so that a resumed run computes the same. Weights, losses and updates stay float32.

    Args:
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16`` (for GPUs; on a CPU it means bf16).
        device: where training runs.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if cpu_has_bf16() else None
    if precision == "fp16" and device.type == "cuda":
        return torch.float16
    return None if precision == "fp32" else torch.bfloat16


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 matrices itself; False where there is no such file."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def seed_step(seed: int, step: int, slot: int) -> int:
    """Set all random states to what (seed, step, slot) determine; returns the number used.

    A step's random numbers then do not depend on anything before: a resumed run draws what an
    uninterrupted one would have.

    Args:
        seed: of the run.
        step: optimiser step.
        slot: micro-batch within the step, over all ranks.
    """
    state = np.random.SeedSequence([seed, step, slot]).generate_state(2, np.uint32)
    number = int(state[0]) << 31 | int(state[1]) >> 1
    random.seed(number)
    np.random.seed(int(state[0]))  # plugins may draw from the global state
    # Not torch.manual_seed: while CUDA is not in use, that notes every call, with a stack trace.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)
    return number


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to ``max_norm`` in all; returns the norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
