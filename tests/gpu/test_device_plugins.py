"""Every registered loss, head, architecture, compressor and decoder: its results on the device are the CPU's.

All are found in the registry, so a new plugin is covered by being there.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    HALF,
    RELATIVE,
    RELATIVE_GRADIENT,
    RELATIVE_HALF,
    assert_close,
    assert_same_fields,
    on_device,
    variants,
)
from torch import nn

from kdrecipe.errors import MissingExtra
from kdrecipe.interfaces import LossSetup, Targets
from kdrecipe.model.asr import AsrModel, build_model, model_info
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.targets.kinds import KINDS
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.testing.checks import expected_failures, run
from kdrecipe.testing.compressor_checks import COMPRESSOR_CHECKS, CompressorCase
from kdrecipe.testing.decode_checks import DecoderCase, SpitefulModel, tiny_recogniser
from kdrecipe.testing.loss_checks import LossCase, call, cast, floats, leaves
from kdrecipe.testing.models import random_batch

PLUGINS = load_plugins()
REGISTRY = PLUGINS.registry
NUM_BINS, VOCAB_SIZE = 80, 9


def every(kind: str) -> list[Any]:
    """A test's parameter for every plugin of a kind under each of its options: (class, configuration)."""
    return [
        pytest.param(REGISTRY.get(kind, name), config, id=f"{name}-{options}" if options else name)
        for name in REGISTRY.names(kind)
        for options, config in variants(REGISTRY.get(kind, name))
    ]


@contextmanager
def skip_if_missing():
    """Skip a test whose plugin needs a package that is not installed."""
    try:
        yield
    except MissingExtra as missing:
        pytest.skip(str(missing))


def test_the_shipped_plugins_load():
    assert PLUGINS.broken == {}
    for kind in ("losses", "heads", "architectures", "compressors", "decoders"):
        assert REGISTRY.names(kind), f"no {kind}: these tests would test nothing"


# ---------------------------------------------------------------- losses


def build_on_device(case: LossCase) -> Any:
    loss = case.build()
    return loss.to(DEVICE) if isinstance(loss, nn.Module) else loss


def total_and_gradients(loss: Any, example: Any) -> tuple[Any, list[torch.Tensor | None]]:
    """A loss's output and its gradients by the student's floating-point tensors."""
    student = leaves(example.out)
    result = call(loss, replace(example, out=student))
    grads = torch.autograd.grad(result.total, floats(student), allow_unused=True)
    return result, list(grads)


@pytest.mark.parametrize(("cls", "config"), every("losses"))
def test_loss_in_fp32(cls, config):
    case = LossCase(cls, config)
    with skip_if_missing():
        want, want_grads = total_and_gradients(case.build(), case.example())
    got, got_grads = total_and_gradients(build_on_device(case), on_device(case.example()))
    assert got.total.device.type == DEVICE.type
    assert_close(got.total, want.total, RELATIVE, "total")
    assert_close(float(got.count), float(want.count), 0.0, "count")
    assert_same_fields(got.metrics, want.metrics, RELATIVE, "metrics")
    for number, (grad, expected) in enumerate(zip(got_grads, want_grads, strict=True)):
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert_close(grad, expected, RELATIVE_GRADIENT, f"gradient {number}")


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize(("cls", "config"), every("losses"))
def test_loss_in_half_precision(cls, config, precision):
    """Near to what float64 gives on the CPU for the same rounded numbers; gradients are finite."""
    case = LossCase(cls, config)
    with skip_if_missing():
        exact_loss = case.build()
    example = case.example()
    example = replace(example, out=cast(example, HALF[precision]).out)
    exact = exact_loss.double() if isinstance(exact_loss, nn.Module) else exact_loss
    want = call(exact, cast(example, torch.float64))
    with torch.autocast(DEVICE.type, HALF[precision]):
        got, grads = total_and_gradients(build_on_device(case), on_device(example))
    total, wanted = float(got.total.detach()), float(want.total)
    difference = abs(total - wanted)
    assert difference <= RELATIVE_HALF * abs(wanted), f"total is {total:.6g}, {wanted:.6g} in float64"
    assert all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """An architecture with one head (and CTC), small and without dropout, the same on each device."""

    architecture: str
    head: str
    options: Any

    def build(self, device: torch.device, seed: int = 0) -> AsrModel:
        given = self.options.model_dump()
        given |= {"num_layers": 1} if "num_layers" in given else {}
        head = {k: 0.0 if "dropout" in k else v for k, v in given.items()}
        cls = REGISTRY.get("architectures", self.architecture)
        encoder = {**getattr(cls, "contract_options", {})}
        encoder |= {k: 0.0 for k in cls.Config.model_fields if "dropout" in k}
        description = {"name": self.architecture, **encoder, "heads": {self.head: head, "ctc": {}}}
        torch.manual_seed(seed)
        model = build_model(description, input_dim=NUM_BINS, vocab_size=VOCAB_SIZE, registry=REGISTRY)
        return model.to(device).train()

    def batch(self) -> Any:
        return random_batch((61, 48, 30), input_dim=NUM_BINS, vocab_size=VOCAB_SIZE, num_tokens=(5, 3, 2))

    def loss(self, model: AsrModel, out: Any, batch: Any) -> torch.Tensor:
        """Loss per token of the head's own loss, the one of its name."""
        cls = REGISTRY.get("losses", self.head)
        result = cls(cls.Config(), LossSetup(model_info(model, "tiny")))(out, Targets(), batch)
        total: torch.Tensor = result.total / result.count
        return total


MODELS = [
    pytest.param(Model(architecture, head, config), id=f"{architecture}-{head}{'-' * bool(options)}{options}")
    for architecture in REGISTRY.names("architectures")
    for head in REGISTRY.names("heads")
    for options, config in variants(REGISTRY.get("heads", head))
]


def gradient_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("case", MODELS)
def test_model_in_fp32(case):
    """Hidden states, logits, lattices, the loss of the head and its gradient by the weights."""
    losses, outputs, gradients = [], [], []
    for device in (torch.device("cpu"), DEVICE):
        model, batch = case.build(device), case.batch().map(lambda x, device=device: x.to(device))
        outputs.append(model(batch.features_BTF, batch.lens_B, batch=batch))
        losses.append(case.loss(model, outputs[-1], batch))
        losses[-1].backward()
        gradients.append(gradient_of(model))
    assert_same_fields(outputs[1], outputs[0], RELATIVE, "output")
    assert_close(losses[1], losses[0], RELATIVE, "loss")
    assert (gradients[1] - gradients[0]).norm() <= RELATIVE_GRADIENT * gradients[0].norm()


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("case", MODELS)
def test_model_in_half_precision(case, precision):
    """As the training loop does it: under autocast, outputs to float32, then the loss."""
    model, batch = case.build(DEVICE), on_device(case.batch())
    exact = case.loss(model, model(batch.features_BTF, batch.lens_B, batch=batch), batch)
    with torch.autocast(DEVICE.type, HALF[precision]):
        out = model(batch.features_BTF, batch.lens_B, batch=batch)
    out = out.map(lambda x: x.float() if x.is_floating_point() else x)
    loss = case.loss(model, out, batch)
    loss.backward()
    assert_close(loss, exact, 0.05, "loss")
    assert bool(gradient_of(model).isfinite().all())
    with torch.no_grad(), torch.autocast(DEVICE.type, HALF[precision]):
        assert len(model.eval().greedy(out, case.head)) == len(batch)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_greedy_search_of_a_model(case):
    """The head's own search says the same on the device."""
    said = []
    for device in (torch.device("cpu"), DEVICE):
        model, batch = case.build(device).eval(), case.batch().map(lambda x, device=device: x.to(device))
        for weight in model.heads[case.head].parameters():
            weight.mul_(3)  # surer of itself: no near ties
        said.append(model.greedy(model.encode(batch.features_BTF, batch.lens_B), case.head))
    assert said[1] == said[0]


@pytest.mark.parametrize("case", MODELS)
def test_targets_of_a_teacher(case):
    """All that a model can teach is the same on the device, labelled or along its own words."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model, batch = case.build(device), case.batch().map(lambda x, device=device: x.to(device))
        batch.labelled_B[1] = False
        specs = [spec for spec in model_info(model, "tiny").provides() if spec.kind in KINDS]
        found.append(
            LiveTargets(ModelTeacher(model), [replace(spec, dtype="float32") for spec in specs]).targets(
                batch
            )
        )
    assert_same_fields(found[1], found[0], RELATIVE_GRADIENT, "targets")
    assert found[1].items.keys() == found[0].items.keys()


# ---------------------------------------------------------------- searches, compressors


@pytest.mark.parametrize(("cls", "config"), every("decoders"))
def test_decoder(cls, config):
    """Tokens, times and scores of a search, alone and with a language model."""
    case = DecoderCase(cls, config)
    models: list[dict[str, Any]] = [{}]
    if "lm_weight" in cls.Config.model_fields and not getattr(cls, "needs_lm", False):
        models.append({"lm": SpitefulModel(hated=4)})
    for lm in models:
        model = tiny_recogniser(cls.head)
        with skip_if_missing():
            want = case.decode(case.output(), model, **lm)
        got = case.decode(on_device(case.output()), model.to(DEVICE), **lm)
        assert [h.tokens for h in got] == [h.tokens for h in want]
        assert [h.times_s for h in got] == [h.times_s for h in want]
        for hypothesis, expected in zip(got, want, strict=True):
            assert (hypothesis.score is None) == (expected.score is None)
            if expected.score is not None:
                assert_close(hypothesis.score, expected.score, RELATIVE, "score")


@dataclass(frozen=True)
class CompressorOnDevice(CompressorCase):
    """The contract's case with model and batches on the device."""

    def batch(self, seed: int = 0) -> Any:
        return on_device(super().batch(seed))


def recogniser(device: torch.device) -> Any:
    """Makes a small real recogniser for a seed."""
    case = Model("conformer", "ctc", REGISTRY.config("heads", "ctc"))

    def make(seed: int) -> nn.Module:
        return case.build(device, seed).eval()

    return make


@pytest.mark.parametrize(("cls", "config"), every("compressors"))
def test_compressor(cls, config):
    """It keeps its contract on the device, and the compressed model says what the CPU's says."""
    with skip_if_missing():
        on_cpu = CompressorCase(cls, config, recogniser(torch.device("cpu")), NUM_BINS)
        on_gpu = CompressorOnDevice(cls, config, recogniser(DEVICE), NUM_BINS)
        results = run(on_gpu, COMPRESSOR_CHECKS, expected_failures(cls, None, COMPRESSOR_CHECKS))
        want, got = (case.output(case.compress()[1]).logits["ctc"] for case in (on_cpu, on_gpu))
    assert [(r.check_id, r.reason) for r in results if not r.ok] == []
    assert got.device.type == DEVICE.type
    # A value that lies between two steps of a grid may be rounded the other way.
    assert_close(got, want, 0.02, "logits")
