"""What every loss must hold to, term by term of the training loop's arithmetic.

B utterances, T frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from kdrecipe.frames import frame_mask, keep_top
from kdrecipe.interfaces import (
    Batch,
    GivenTargets,
    LossOutput,
    LossSetup,
    ModelOutput,
    Posteriors,
    Progress,
    TargetKind,
    Targets,
    TargetSpec,
    call_loss,
)
from kdrecipe.testing.checks import CheckFailed, CheckSkipped, by_id, check_config_strict, require
from kdrecipe.testing.models import (
    INPUT_DIM,
    SUBSAMPLING,
    loss_setup,
    model_info,
    random_batch,
    random_output,
    targets_like,
)

LENS = (9, 6, 7)  # encoder frames
RELATIVE = 1e-4  # float32 sums in another order
RELATIVE_BF16 = 0.02
MIDWAY = Progress(step=41, num_steps=100)  # within schedules


@dataclass(frozen=True)
class Example:
    """One call's worth of arguments."""

    out: ModelOutput
    targets: GivenTargets
    batch: Batch

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Every tensor changed."""
        return Example(
            self.out.map(change), each(self.targets, lambda t: t.map(change)), self.batch.map(change)
        )


def each(targets: GivenTargets, change: Callable[[Targets], Targets]) -> GivenTargets:
    """One teacher's targets changed, or those of all."""
    if isinstance(targets, Targets):
        return change(targets)
    return {name: change(t) for name, t in targets.items()}


def listed(targets: GivenTargets) -> list[Targets]:
    """The targets of one teacher or of several, as a list."""
    return [targets] if isinstance(targets, Targets) else list(targets.values())


@dataclass(frozen=True)
class LossCase:
    """A loss class under test, with its options and the pair of models it stands between."""

    cls: Any
    config: Any
    setup: LossSetup | None = None

    @property
    def models(self) -> LossSetup:
        """The models; by default student and teacher (or two of them) of the same size."""
        if self.setup is None and self.takes_all:
            names = getattr(self.cls, "contract_teachers", ("first", "second"))
            return LossSetup(model_info(), teachers=dict.fromkeys(names, model_info()))
        return self.setup or loss_setup()

    @property
    def takes_all(self) -> bool:
        """Whether it gets the targets of all teachers at once."""
        return bool(getattr(self.cls, "all_teachers", False))

    def build(self) -> Any:
        """The loss, the same each time; in evaluation mode if it is a module."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = self.cls(self.config, self.models)
        return loss.eval() if isinstance(loss, nn.Module) else loss

    def specs(self) -> list[TargetSpec]:
        """What it requires; nothing if it does not say."""
        return list(self.cls.requires(self.config)) if hasattr(self.cls, "requires") else []

    def example(self, *, noise: float = 1.0, lens: tuple[int, ...] = LENS, seed: int = 0) -> Example:
        """Random student, a teacher that differs from it by noise, and labels."""
        num_views = getattr(self.cls, "num_views", 1)
        batch = random_batch(
            [SUBSAMPLING * n for n in lens],
            input_dim=INPUT_DIM,
            vocab_size=self.models.student.vocab_size,
            num_tokens=[max(1, n // 4) for n in lens],
            seed=seed,
        )
        out = random_output(
            lens,
            taps=tuple(getattr(self.build(), "taps", ())),
            num_views=num_views,
            info=self.models.student,
            batch=batch,
            seed=seed,
        )
        infos = self.models.teachers if self.takes_all else {"": self.models.teacher or model_info()}
        found = {
            name: targets_like(out, self.specs(), noise=noise, teacher=info, seed=seed + 1 + i)
            for i, (name, info) in enumerate(infos.items())
        }
        return Example(out, found if self.takes_all else found[""], batch.repeat(num_views))

    def needs_teacher(self) -> None:
        """Skip the check if the loss has no teacher."""
        if not self.specs():
            raise CheckSkipped("it needs no teacher")


def call(loss: Any, example: Example) -> LossOutput:
    """Call a loss; its answer must be a LossOutput with a scalar total."""
    result = call_loss(loss, example.out, example.targets, example.batch, MIDWAY)
    require(isinstance(result, LossOutput), f"it returns {type(result).__name__}, not LossOutput")
    require(result.total.dim() == 0, f"total has shape {tuple(result.total.shape)}, not that of a scalar")
    return result


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Floating-point tensors in another type."""
    return example.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def _same(got: float, want: float, relative: float = RELATIVE) -> bool:
    return abs(got - want) <= relative * max(1.0, abs(want))


def _values(result: LossOutput) -> tuple[float, float]:
    return float(result.total.detach()), float(result.count)


# ---------------------------------------------------------------- checks


def check_padding_invariance(case: LossCase) -> None:
    """Total and count do not depend on the content or the amount of padding."""
    loss, example = case.build(), case.example()
    want, got = _values(call(loss, example)), _values(call(loss, _other_padding(example)))
    for name, a, b in zip(("total", "count"), want, got, strict=True):
        require(_same(b, a), f"{name} went from {a:.6g} to {b:.6g} when only the padding changed")


def _other_padding(example: Example) -> Example:
    """Three more frames of padding and two more tokens, all padding filled with other noise."""
    rng = torch.Generator().manual_seed(99)
    num_frames, num_tokens = example.out.hidden_BTD.shape[1], example.batch.tokens_BU.shape[1]
    valid = {
        num_frames: example.out.lens_B,
        num_tokens: example.batch.token_lens_B,
        num_tokens + 1: example.batch.token_lens_B + 1,
    }

    def change(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] not in valid:
            return x
        more = torch.cat([x, x[:, :1].repeat_interleave(3 if x.shape[1] == num_frames else 2, 1)], dim=1)
        if x.is_floating_point():
            noise = -10 * torch.rand(more.shape, generator=rng)
        else:
            noise = more.flip(1)
        keep = frame_mask(valid[x.shape[1]], more.shape[1]).view(*more.shape[:2], *[1] * (x.dim() - 2))
        return torch.where(keep, more, noise)

    batch = replace(example.batch, tokens_BU=change(example.batch.tokens_BU))
    return Example(example.out.map(change), each(example.targets, lambda t: t.map(change)), batch)


def check_doubling(case: LossCase) -> None:
    """Every utterance twice in the batch: total, count and metrics twice as large (of pairs: four times)."""
    factor = 4 if getattr(case.cls, "per", "") == "pairs" else 2
    loss, example = case.build(), case.example()
    size = len(example.out.lens_B) // example.out.num_views
    rows = torch.cat([torch.arange(size).repeat(2) + size * v for v in range(example.out.num_views)])
    doubled = example.map(lambda x: x[rows])
    doubled.batch.ids = [example.batch.ids[i] for i in rows]
    doubled.batch.texts = [example.batch.texts[i] for i in rows]
    once, twice = call(loss, example), call(loss, doubled)
    pairs = {"total": (once.total, twice.total), "count": (once.count, twice.count)}
    pairs |= {f"metric {name}": (once.metrics[name], twice.metrics[name]) for name in once.metrics}
    for name, pair in pairs.items():
        a, b = (float(torch.as_tensor(value).detach()) for value in pair)
        require(_same(b, factor * a), f"{name} is {a:.6g}, and {b:.6g} for the doubled batch")
    require(float(once.count) > 0, "count is 0 for a batch with frames and labels")


def check_minimum_at_teacher(case: LossCase) -> None:
    """The loss is least where the student says what the teacher says."""
    case.needs_teacher()
    loss = case.build()
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise CheckSkipped("it has its own weights between student and teacher")
    equal = cast(case.example(noise=0.0), torch.float64)
    student = leaves(equal.out)
    result = call(loss, Example(student, equal.targets, equal.batch))
    least = float(result.total.detach())
    scale = max(1.0, float(result.count))
    grads = torch.autograd.grad(result.total, floats(student), allow_unused=True)
    steepest = max((float(g.abs().max()) for g in grads if g is not None), default=0.0)
    require(steepest < 1e-5, f"its gradient there is {steepest:.3g}, not 0")
    rng = torch.Generator().manual_seed(5)
    for size in (0.01, 0.1, 1.0):
        moved = equal.out.map(
            lambda x, size=size: x + size * _noise(x, rng) if x.is_floating_point() else x  # type: ignore[misc]
        )
        total = float(call(loss, Example(moved, equal.targets, equal.batch)).total)
        require(total >= least - 1e-6 * scale, f"it is {least:.6g} there and {total:.6g} nearby")


def _noise(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=rng, dtype=x.dtype)


def leaves(out: ModelOutput) -> ModelOutput:
    """A copy whose floating-point tensors take gradients."""
    return out.map(lambda x: x.detach().clone().requires_grad_(True) if x.is_floating_point() else x)


def floats(out: ModelOutput) -> list[Tensor]:
    """Its floating-point tensors, in a fixed order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    out.map(note)
    return found


def check_no_gradient_into_targets(case: LossCase) -> None:
    """Nothing flows back into the teacher's targets."""
    case.needs_teacher()
    loss, example = case.build(), case.example()
    targets = example.map(
        lambda x: x.detach().clone().requires_grad_(True) if x.is_floating_point() else x
    ).targets
    student = leaves(example.out)
    call(loss, Example(student, targets, example.batch)).total.backward()  # type: ignore[no-untyped-call]
    items = [pair for one in listed(targets) for pair in one.items.items()]
    for key, item in items:
        for name, value in vars(item).items():
            flows = isinstance(value, Tensor) and value.grad is not None and bool((value.grad != 0).any())
            require(not flows, f"a gradient reaches {name} of {key}: detach it")


def check_gradcheck(case: LossCase) -> None:
    """Its gradient is that of its value, by finite differences in float64."""
    loss = case.build()
    if isinstance(loss, nn.Module):
        loss = loss.double()
    example = cast(case.example(lens=(4, 3)), torch.float64)
    student = leaves(example.out)

    def total(*values: Tensor) -> Tensor:
        given = iter(values)
        out = student.map(lambda x: next(given) if x.is_floating_point() else x)
        return call(loss, Example(out, example.targets, example.batch)).total

    try:
        gradcheck(total, tuple(floats(student)), atol=1e-5, rtol=1e-3)
    except GradcheckError as error:
        raise CheckFailed(f"gradient and finite differences disagree: {str(error).strip()[:200]}") from error


def check_bf16(case: LossCase) -> None:
    """Given bf16 outputs, total is within 2 % of what float64 gives for the same numbers."""
    rounded = case.example(noise=0.1).out.map(lambda x: x.bfloat16() if x.is_floating_point() else x)
    example = replace(case.example(noise=0.1), out=rounded)
    exact_loss = case.build()
    exact = call(
        exact_loss.double() if isinstance(exact_loss, nn.Module) else exact_loss, cast(example, torch.float64)
    )
    student = leaves(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(case.build(), replace(example, out=student))
    result.total.backward()  # type: ignore[no-untyped-call]
    want, got = _values(exact)[0], _values(result)[0]
    close = abs(got - want) <= RELATIVE_BF16 * abs(want)
    require(close, f"total is {got:.6g} in bf16, {want:.6g} in float64: compute in float32 (full_precision)")
    finite = all(bool(x.grad.isfinite().all()) for x in floats(student) if x.grad is not None)
    require(finite, "its gradient is not finite in bf16")


def check_top_k_limit(case: LossCase) -> None:
    """Targets of all classes but one, and the tail, give the total of full targets; so do all, permuted."""
    case.needs_teacher()
    loss, example = case.build(), case.example()
    full = [v for one in listed(example.targets) for v in one.items.values() if isinstance(v, Posteriors)]
    if not full:
        raise CheckSkipped("it reads no posteriors")
    if any(item.indices_BTK is not None for item in full):
        raise CheckSkipped("these options ask for top-k targets")
    want = float(call(loss, example).total)
    for what, change in (("all but one class", _all_but_one), ("all classes, permuted", _permuted)):
        changed = each(example.targets, lambda t, change=change: _with_posteriors(t, change))  # type: ignore[misc]
        got = float(call(loss, replace(example, targets=changed)).total)
        require(_same(got, want), f"total is {got:.6g} from {what}, and {want:.6g} from full targets")


def _with_posteriors(targets: Targets, change: Callable[[Posteriors], Posteriors]) -> Targets:
    items = {k: change(v) if isinstance(v, Posteriors) else v for k, v in targets.items.items()}
    return replace(targets, items=items)


def _all_but_one(item: Posteriors) -> Posteriors:
    return keep_top(item, item.log_probs_BTK.shape[-1] - 1)


def _permuted(item: Posteriors) -> Posteriors:
    order_BTK = item.log_probs_BTK.argsort(dim=-1)
    return Posteriors(item.log_probs_BTK.gather(-1, order_BTK), item.lens_B, order_BTK)


def check_empty_selection(case: LossCase) -> None:
    """No valid frame and no label: total and count are 0, and so is the gradient."""
    loss, example = case.build(), case.example()
    if any(spec.kind in ("token_logits", "token_hidden") for spec in case.specs()):
        nothing = example.map(lambda x: x[:0])  # without words, too, there is the end of the sentence
    else:
        nothing = example.map(lambda x: x if x.dim() != 1 else torch.zeros_like(x))
    student = leaves(nothing.out)
    result = call(loss, Example(student, nothing.targets, nothing.batch))
    total, count = _values(result)
    require(total == 0, f"total is {total}, not 0")
    require(count == 0, f"count is {count:g}, not 0")
    if result.total.requires_grad:
        result.total.backward()  # type: ignore[no-untyped-call]
        still = all(bool((x.grad == 0).all()) for x in floats(student) if x.grad is not None)
        require(still, "its gradient is not 0")


def check_requires_valid(case: LossCase) -> None:
    """``requires`` lists sound target specs, each target once, the same at every call."""
    specs = case.specs()
    require(specs == case.specs(), "requires gives different answers for the same options")
    for spec in specs:
        require(isinstance(spec, TargetSpec), f"requires lists {spec!r}, which is no TargetSpec")
        require(spec.kind in get_args(TargetKind), f"{spec.kind!r} is no kind of target")
        require(spec.dtype in ("float16", "float32"), f"{spec.key}: dtype {spec.dtype!r} can't be stored")
        require(spec.top_k is None or spec.top_k >= 1, f"{spec.key}: top_k is {spec.top_k}")
    keys = [spec.key for spec in specs]
    require(len(set(keys)) == len(keys), f"requires lists a target twice: {', '.join(keys)}")


LOSS_CHECKS = by_id(
    check_padding_invariance,
    check_doubling,
    check_minimum_at_teacher,
    check_no_gradient_into_targets,
    check_gradcheck,
    check_bf16,
    check_top_k_limit,
    check_empty_selection,
    check_config_strict,
    check_requires_valid,
)
"""Contract of a loss, by check id."""
