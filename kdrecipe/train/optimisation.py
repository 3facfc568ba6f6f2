"""Optimiser, learning-rate schedule, numerical precision, random state of a step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

if TYPE_CHECKING:
    from kdrecipe.recipe.sections import Training

OptimizerHook = Callable[..., Optimizer | None]
"""``hook(params=groups, config=options)``; None leaves it to :func:`make_optimizer`."""


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for everything else, as one optimiser.

    Muon (Jordan et al. 2024; torch's) turns a matrix's momentum into the nearest orthogonal one, so that
    all its directions learn at the same rate: what keeps CTC on its plateau of blanks under AdamW. Its
    updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so both share a
    learning rate.

    Args:
        hidden: groups of matrices, each with its ``weight_decay``.
        others: groups for AdamW.
        lr: the highest learning rate.
        betas: of AdamW; Muon's momentum is 0.95.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
    ) -> None:
        # Not Optimizer.__init__: groups and state are those of the two.
        self.parts: list[Optimizer] = [
            Muon(hidden, lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=lr, betas=betas, fused=True),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The state of both."""
        return {p: value for part in self.parts for p, value in part.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def make_optimizer(
    model: nn.Module,
    others: Iterable[nn.Parameter],
    options: Training,
    hook: OptimizerHook | None = None,
) -> Optimizer:
    """The plugin's optimiser, or else the recipe's; no weight decay on biases and norms.

    Args:
        model: what is trained.
        others: parameters of losses, trained along.
        options: the recipe's ``training``, for this model.
        hook: see :data:`OptimizerHook`.
    """
    assert options.lr != "auto"  # the loop knows what that is for this model
    trainable = [p for p in model.parameters() if p.requires_grad]
    added = _groups([p for p in others if p.requires_grad], options.weight_decay)
    # Those of losses are groups of their own: of a model that is divided among processes, they are not.
    groups = _groups(trainable, options.weight_decay) + added
    optimizer = hook(params=groups, config=options) if hook else None
    if optimizer is None:
        hidden = hidden_matrices(model) if options.optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        rest = _groups([p for p in trainable if id(p) not in taken], options.weight_decay) + added
        if hidden and rest:
            muon = [{"params": hidden, "weight_decay": options.weight_decay}]
            optimizer = MuonWithAdamW(muon, rest, options.lr, options.betas)
        else:
            # Fused: one pass over all weights instead of a dozen small operations for each tensor.
            optimizer = AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of linear layers between hidden states: not those that read or write tokens.

    Embeddings and outputs have rows that are seldom used, which an orthogonal update would move as
    much as the others (Jordan et al. 2024 leave them to AdamW).
    """
    outputs = {
        id(layer.weight)
        for head in model.modules()
        for layer in head.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == getattr(head, "vocab_size", None)
    }
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return [
        weight
        for number, weight in weights.items()
        if number not in outputs and isinstance(weight, nn.Parameter) and weight.requires_grad
    ]


@dataclass(frozen=True)
class Cooldown:
    """The last part of a run under ``schedule: wsd``: the learning rate falls to 0.

    Args:
        after_epoch: it begins with the epoch after this one.
        last_epoch: it ends with this one, and with it the run.
        from_step: the last step at the full rate.
        num_steps: it takes.
        reason: why it began: ``flat``, ``bound`` or ``no dev``, see :func:`cooldown_reason`.
    """

    after_epoch: int
    last_epoch: int
    from_step: int
    num_steps: int
    reason: str


def cooldown_reason(history: Sequence[Mapping[str, Any]], options: Training) -> str | None:
    """Whether the learning rate is to fall from now on, and why; None: training goes on as it is.

    - ``flat``: over the last quarter of the evaluations, six at least, the dev error fell by less than
      ``options.flat`` of what it was. An error rate above 0.8 is CTC's plateau, not an end.
    - ``bound``: what is left until ``epochs`` just suffices for the cool-down.

    Args:
        history: the log's entries of all epochs so far, the newest last.
        options: the recipe's ``training``.
    """
    epoch = int(history[-1]["epoch"])
    scores = [float(e["dev_ter"]) for e in history if e.get("dev_ter") is not None]
    recent = max(_FEWEST, math.ceil(len(scores) / 4))
    if len(scores) > recent:
        before, now = min(scores[:-recent]), min(scores)
        if now <= _PLATEAU and now >= (1 - options.flat) * before:
            return "flat"
    if epoch < options.epochs < epoch + 1 + _cooldown_epochs(epoch + 1, options):
        return "bound" if scores else "no dev"
    return None


_PLATEAU = 0.8
_FEWEST = 6
"""Evaluations that tell a flat end from the noise of a small dev set."""


def last_epoch(epoch: int, reason: str, options: Training) -> int:
    """Where a cool-down ends that begins after ``epoch``: with the bound where that is its reason."""
    return (
        min(epoch + _cooldown_epochs(epoch, options), options.epochs) if reason == "flat" else options.epochs
    )


def _cooldown_epochs(epoch: int, options: Training) -> int:
    return max(1, round(options.cooldown * epoch))


def wsd_factor(step: int, warmup_steps: int, cooldown: Cooldown | None) -> float:
    """Share of the highest learning rate at ``step`` (1-based): warm-up, stable, decay.

    The decay is ``1 - sqrt``, which Hägele et al. 2024 (arXiv 2405.18392) found to end lowest.
    """
    if cooldown is not None and step > cooldown.from_step:
        return 1 - math.sqrt((step - cooldown.from_step - 1) / cooldown.num_steps)
    return min(1.0, step / max(1, warmup_steps))


def lr_factor(step: int, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the highest learning rate at ``step`` (1-based) of ``num_steps``, never 0.

    Args:
        step: the step about to be done.
        num_steps: of the whole run.
        warmup_steps: in which the factor rises to 1.
        schedule: ``cosine``, ``linear`` (both fall towards 0), ``noam`` or ``constant``.
    """
    rising = max(1, warmup_steps)
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
