"""Linear layers whose weights are integers. O outputs, I inputs, N rows, G groups.

Each declares its ``number_format``, gives its twin in float32 (``to_float``), is made of an ``nn.Linear``
(``from_linear``) or empty in its shape (``like``), and writes its own ONNX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onnx_ops
from .onnx_ops import FRAME_STEP, MIDDLE, MIN_SCALE

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

QMAX = 127  # -128 is left out: symmetric, so that 0 stays 0 and pruned weights stay pruned
QMAX_REDUCED = 63  # sums of two products then fit the 16 bits that x86 without VNNI adds them in
QMAX_INT4 = 7
EXACT_IN_FP32 = 2**24  # sums of whole numbers below this


def rows_to_int8(weight: Tensor, qmax: int = QMAX) -> tuple[Tensor, Tensor]:
    """The nearest of ``2 * qmax + 1`` steps per output row (axis 0): integers and the steps (O,)."""
    rows = weight.detach().float().flatten(1)
    scale_O = (rows.abs().amax(1) / qmax).clamp_min(MIN_SCALE)
    integers = (rows / scale_O[:, None]).round().clamp(-qmax, qmax).to(torch.int8)
    return integers.view_as(weight), scale_O


def rounded_frames(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 with a scale per frame (last axis), and its largest magnitude."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(MIN_SCALE)
    return (x / largest / FRAME_STEP).round(), largest


class Int8Linear(nn.Module):
    """``nn.Linear`` with int8 weights, symmetric, a scale per output row; activations have a scale per frame.

    A frame's result hence never depends on padding, on the rest of the utterance or on other utterances.

    State: ``weight`` (O, I) int8, ``scale_O`` float32, ``bias`` (O) or None; all plain tensors.
    """

    number_format: ClassVar[str] = "int8"
    scale_O: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        # A parameter, not a buffer, so that the number of parameters is the parent's.
        weight_OI = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_buffer("scale_O", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear) -> Self:
        """Empty, in the shape of ``linear``."""
        return cls(linear.in_features, linear.out_features, linear.bias is not None).to(linear.weight.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, qmax: int = QMAX) -> Self:
        """Round a layer's weights to the nearest of ``2 * qmax + 1`` steps per output row."""
        new = cls.like(linear)
        new.weight.data, new.scale_O = rows_to_int8(linear.weight, qmax)
        new.take_bias(linear)
        return new.train(linear.training)

    def take_bias(self, linear: nn.Linear) -> None:
        """A copy of the bias of ``linear``."""
        if self.bias is not None:
            self.bias.data = linear.bias.detach().float().clone()

    def float_weight(self) -> Tensor:
        """(O, I) float32, what the integers stand for."""
        return self.weight.float() * self.scale_O[:, None]

    def to_float(self) -> nn.Linear:
        """The layer with the same (rounded) weights in float32."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight.data = self.float_weight()
        if self.bias is not None:
            linear.bias.data = self.bias.detach().clone()
        return linear.requires_grad_(False).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the type of ``x``."""
        if onnx_ops.exporting():
            y = self.in_onnx(x)
            return y if self.bias is None else y + self.bias
        y = self.product(x.reshape(-1, self.in_features).float())
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def product(self, x_NI: Tensor) -> Tensor:
        """(N, O), without the bias."""
        integers_NI, largest_N1 = rounded_frames(x_NI)
        return self.sums(integers_NI) * (FRAME_STEP * self.scale_O) * largest_N1

    def sums(self, integers_NI: Tensor) -> Tensor:
        """The product of whole numbers, -128 to 127, with the integer weights, exact."""
        if not integers_NI.is_cuda:
            return torch._int_mm(integers_NI.to(torch.int8), self.weight.t()).float()
        # its int8 product needs multiples of 8
        exact = torch.float64 if self.in_features * 128 * QMAX > EXACT_IN_FP32 else torch.float32
        return (integers_NI.to(exact) @ self.weight.t().to(exact)).float()

    def in_onnx(self, x: Tensor) -> Tensor:
        """The same in the graph that is traced."""
        constants = onnx_ops.constant(self.weight.t()), onnx_ops.constant(self.scale_O)
        y: Tensor = onnx_ops.FrameProduct.apply(x, *constants)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class StaticInt8Linear(Int8Linear):
    """Activations have one scale, found by calibration, and a zero point: no look at them is needed.

    Further state: ``input_scale`` (), ``input_zero`` () uint8, and ``smooth_I``: what inputs are divided by
    first (ones: nothing), with the weights multiplied by it (SmoothQuant).
    """

    number_format: ClassVar[str] = "int8_static"
    input_scale: Tensor
    input_zero: Tensor
    smooth_I: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("input_scale", torch.tensor(1.0))
        self.register_buffer("input_zero", torch.tensor(MIDDLE, dtype=torch.uint8))
        self.register_buffer("smooth_I", torch.ones(in_features))

    def float_weight(self) -> Tensor:
        return super().float_weight() / self.smooth_I

    def product(self, x_NI: Tensor) -> Tensor:
        x_NI = (x_NI / self.smooth_I / self.input_scale).round() + self.input_zero.float()
        sums_NO = self.sums(x_NI.clamp(0, 255) - MIDDLE)
        sums_NO += (MIDDLE - self.input_zero.float()) * self.weight.sum(1, dtype=torch.int32).float()
        return sums_NO * (self.input_scale * self.scale_O)

    def in_onnx(self, x: Tensor) -> Tensor:
        if bool((self.smooth_I != 1).any()):
            x = x / onnx_ops.constant(self.smooth_I)
        constants = [self.weight.t(), self.scale_O, self.input_scale, self.input_zero]
        y: Tensor = onnx_ops.StaticProduct.apply(x, *map(onnx_ops.constant, constants))  # type: ignore[no-untyped-call]
        return y


class Int4Linear(nn.Module):
    """``nn.Linear`` with weights of 4 bits, -7 to 7, a scale per group of inputs; it computes in float.

    State: ``weight`` (O, I) int8 with these small values (the ONNX file packs two in a byte), ``scale_OG``,
    ``bias``.

    Args:
        group: inputs that share a scale: 16, 32, 64, ...; the last group may be shorter.
    """

    number_format: ClassVar[str] = "int4"
    scale_OG: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        weight_OI = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_buffer("scale_OG", torch.ones(out_features, -(-in_features // group)))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def like(cls, linear: nn.Linear, group: int = 32) -> Self:
        """Empty, in the shape of ``linear``."""
        sizes = linear.in_features, linear.out_features
        return cls(*sizes, linear.bias is not None, group).to(linear.weight.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group: int = 32) -> Self:
        """Round to 4 bits; of each group, the scale with the least squared error among a few."""
        new = cls.like(linear, group)
        integers_OGg, new.scale_OG = groups_to_int4(new._grouped(linear.weight.detach().float()))
        new.weight.data = integers_OGg.flatten(1)[:, : linear.in_features].to(torch.int8).contiguous()
        if new.bias is not None:
            new.bias.data = linear.bias.detach().float().clone()
        return new.train(linear.training)

    def float_weight(self) -> Tensor:
        """(O, I) float32, what the integers stand for."""
        scale_OI = self.scale_OG.repeat_interleave(self.group, 1)[:, : self.in_features]
        return self.weight.float() * scale_OI

    def to_float(self) -> nn.Linear:
        """The layer with the same (rounded) weights in float32."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight.data = self.float_weight()
        if self.bias is not None:
            linear.bias.data = self.bias.detach().clone()
        return linear.requires_grad_(False).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the type of ``x``."""
        if onnx_ops.exporting():
            y = self.in_onnx(x)
        else:
            y = F.linear(x, self.float_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def in_onnx(self, x: Tensor) -> Tensor:
        """The same in the graph that is traced."""
        halves = (self._grouped(self.weight) + 8).to(torch.uint8).unflatten(2, (-1, 2))
        packed = onnx_ops.constant(halves[..., 0] | (halves[..., 1] << 4))
        scale = onnx_ops.constant(self.scale_OG)
        y: Tensor = onnx_ops.GroupProduct.apply(x, packed, scale, self.in_features, self.group, x.dim())  # type: ignore[no-untyped-call]
        return y

    def _grouped(self, weight_OI: Tensor) -> Tensor:
        """(O, G, group), zeros after the last input."""
        missing = self.scale_OG.shape[1] * self.group - self.in_features
        return F.pad(weight_OI, (0, missing)).view(self.out_features, -1, self.group)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, group={self.group}"


def groups_to_int4(weight_OGg: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (O, G, g) from -7 to 7 and scales (O, G), of the best clipping of each group."""
    largest_OG1 = weight_OGg.abs().amax(2, keepdim=True).clamp_min(MIN_SCALE)
    best: Any = None
    for clip in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale_OG1 = largest_OG1 * (clip / QMAX_INT4)
        integers = (weight_OGg / scale_OG1).round().clamp(-QMAX_INT4, QMAX_INT4)
        error_OG1 = (integers * scale_OG1 - weight_OGg).square().sum(2, keepdim=True)
        if best is None:
            best = error_OG1, integers, scale_OG1
            continue
        better = error_OG1 < best[0]
        best = tuple(
            torch.where(better, a, b) for a, b in zip((error_OG1, integers, scale_OG1), best, strict=True)
        )
    return best[1], best[2].squeeze(2)
