"""What every compressor must hold to, on a tiny model (or one that the caller gives)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.frames import valid_frames
from kdrecipe.interfaces import Batch, CompressContext, ModelOutput
from kdrecipe.testing.checks import CheckSkipped, by_id, check_config_strict, require
from kdrecipe.testing.models import INPUT_DIM, random_batch, tiny_model

NUM_STEPS = 20  # optimiser steps of the little training here
TOLERANCE = 1e-5
SIZE_TOLERANCE = 0.02  # as of a budget


def _tiny(seed: int) -> nn.Module:
    return tiny_model(seed)


@dataclass(frozen=True)
class CompressorCase:
    """A compressor class under test, with its options.

    Args:
        cls: the class.
        config: its options.
        make_model: gives a model for a seed, called like ``AsrModel``; the tiny model by default.
        input_dim: F that the model takes.
    """

    cls: Any
    config: Any
    make_model: Callable[[int], nn.Module] = _tiny
    input_dim: int = INPUT_DIM

    def batch(self, seed: int = 0) -> Batch:
        """A batch of noise."""
        return random_batch((61, 48, 30), input_dim=self.input_dim, seed=seed)

    def context(self) -> CompressContext:
        """Two batches to calibrate with, gradients towards logits of 0, their size as dev error."""
        return CompressContext(
            calibration=lambda: iter([self.batch(1), self.batch(2)]),
            seed=7,
            gradients=self.gradients,
            evaluate=lambda model: float(_loss(model, self.batch(3)).detach()),
        )

    def gradients(self, model: nn.Module) -> Iterator[Batch]:
        """As a recipe's context gives them."""
        model.eval()
        for batch in (self.batch(1), self.batch(2)):
            model.zero_grad(set_to_none=True)
            _loss(model, batch).backward()  # type: ignore[no-untyped-call]
            yield batch
        model.zero_grad(set_to_none=True)

    def compress(self) -> tuple[Any, nn.Module]:
        """A compressor and what it makes of a model, trained a little if it asks for that."""
        compressor = self.cls(self.config)
        model = compressor.apply(self.make_model(0), self.context())
        if compressor.num_epochs > 0:
            _train(compressor, model, self.batch(3))
        return compressor, compressor.finish(model).eval()

    def output(self, model: nn.Module) -> ModelOutput:
        """What a model says about a batch."""
        batch = self.batch(4)
        with torch.no_grad():
            out: ModelOutput = model.eval()(batch.features_BTF, batch.lens_B)
        return out


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean square of the CTC head's logits."""
    out = model(batch.features_BTF, batch.lens_B)
    return valid_frames(out.logits["ctc"], out.lens_B).square().mean()


def _train(compressor: Any, model: nn.Module, batch: Batch) -> float:
    """A few steps towards logits of 0; returns how far the trainable weights moved."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        return 0.0
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.01)
    model.train()
    for step in range(1, NUM_STEPS + 1):
        torch.manual_seed(step)  # as in training, where random numbers depend on the step alone
        optimizer.zero_grad()
        loss = _loss(model, batch)
        if hasattr(compressor, "penalty"):
            loss = loss + compressor.penalty(model, step, NUM_STEPS)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        compressor.on_step(model, step, NUM_STEPS)
    return max(float((a - b.detach()).abs().max()) for a, b in zip(before, params, strict=True))


def _difference(a: Tensor, b: Tensor) -> float:
    require(a.shape == b.shape, f"logits have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).abs().max())


def check_keeps_interface(case: CompressorCase) -> None:
    """The compressed model is called like the model and gives the same heads, shapes and lengths."""
    want = case.output(case.make_model(0))
    got = case.output(case.compress()[1])
    require(isinstance(got, ModelOutput), f"it gives {type(got).__name__}, not ModelOutput")
    require(
        torch.equal(got.lens_B, want.lens_B),
        f"lengths are {got.lens_B.tolist()}, were {want.lens_B.tolist()}",
    )
    require(
        set(got.logits) == set(want.logits), f"heads are {sorted(got.logits)}, were {sorted(want.logits)}"
    )
    for head, logits in want.logits.items():
        shape = tuple(got.logits[head].shape)
        require(shape == tuple(logits.shape), f"{head} has shape {shape}, had {tuple(logits.shape)}")
        require(bool(got.logits[head].isfinite().all()), f"{head} is not finite")


def check_rebuild_roundtrip(case: CompressorCase) -> None:
    """A fresh model, rebuilt and loaded with the compressed weights, gives the same output.

    What ``rebuild`` needs besides the options comes from ``state()``, by way of JSON as in a bundle.
    """
    compressor, compressed = case.compress()
    again = case.cls(case.config)
    if kept := _state(compressor):
        require(hasattr(again, "load_state"), "it has state() and no load_state()")
        again.load_state(kept)
    fresh = again.rebuild(case.make_model(1))
    state = {name: value.clone() for name, value in compressed.state_dict().items()}
    plain = all(isinstance(value, Tensor) for value in state.values())
    require(plain, "the state dict holds more than tensors")
    fresh.load_state_dict(state)
    want, got = case.output(compressed).logits["ctc"], case.output(fresh).logits["ctc"]
    worst = _difference(got, want)
    require(worst < TOLERANCE, f"the rebuilt model differs by {worst:.3g}")


def _state(compressor: Any) -> dict[str, Any]:
    """What a bundle keeps of a compressor that has been applied."""
    plain: dict[str, Any] = {}
    try:
        plain = json.loads(json.dumps(compressor.state() if hasattr(compressor, "state") else {}))
    except (TypeError, ValueError) as error:
        require(False, f"state() can't be written as JSON: {error}")
    return plain


def check_report_numbers(case: CompressorCase) -> None:
    """``report`` gives finite numbers by name, at least one."""
    compressor, _ = case.compress()
    report = compressor.report()
    require(len(report) > 0, "the report is empty")
    for name, value in report.items():
        number = isinstance(value, (int, float)) and math.isfinite(value)
        require(isinstance(name, str) and number, f"the report's {name!r} is {value!r}, not a finite number")


def check_deterministic(case: CompressorCase) -> None:
    """Twice the same model, calibration and seed: twice the same output."""
    worst = _difference(
        case.output(case.compress()[1]).logits["ctc"], case.output(case.compress()[1]).logits["ctc"]
    )
    require(worst == 0, f"two runs differ by {worst:.3g}: draw at random from context.seed only")


def check_finetune_hooks(case: CompressorCase) -> None:
    """If it asks for training: weights can train, and ``finish`` changes little after the last step."""
    compressor = case.cls(case.config)
    require(
        isinstance(compressor.num_epochs, int), f"num_epochs is {compressor.num_epochs!r}, not a whole number"
    )
    if compressor.num_epochs <= 0:
        raise CheckSkipped("it asks for no training")
    model = compressor.apply(case.make_model(0), case.context())
    require(_train(compressor, model, case.batch(3)) > 0, "no weight moves in training")
    before = case.output(copy.deepcopy(model)).logits["ctc"]
    after = case.output(compressor.finish(model)).logits["ctc"]
    worst, scale = _difference(after, before), float(before.abs().max())
    require(
        worst <= 0.05 * scale, f"finish changes the output by {worst:.3g} of {scale:.3g} after the last step"
    )


def check_strength_meets_budgets(case: CompressorCase) -> None:
    """If it names a ``strength``: more of it makes the model smaller, and training changes no size."""
    option = getattr(case.cls, "strength", None)
    if option is None:
        raise CheckSkipped("it has no strength for a budget to decide")

    def size(strength: float) -> int:
        config = type(case.config).model_validate({**case.config.model_dump(), option: strength})
        compressor = case.cls(config)
        return _num_params(compressor.finish(compressor.apply(case.make_model(0), case.context())))

    own, trained = float(getattr(case.config, option)), _num_params(case.compress()[1])
    found, whole = size(own), size(0.0)
    require(found < whole, f"at {option} {own} it leaves {found} parameters, at 0 {whole}")
    near = abs(found - trained) <= SIZE_TOLERANCE * whole
    require(near, f"{found} parameters without training, {trained} with it")


def _num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


COMPRESSOR_CHECKS = by_id(
    check_keeps_interface,
    check_rebuild_roundtrip,
    check_report_numbers,
    check_deterministic,
    check_finetune_hooks,
    check_strength_meets_budgets,
    check_config_strict,
)
"""Contract of a compressor, by check id."""
