"""How quantised layers are written in ONNX: each with its own integers and scales, nothing rounded again.

A function here computes nothing that matters: layers call it only while a graph is traced for ONNX, and its
``symbolic`` writes the operators that compute what the layer computes in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_SCALE = 1e-12  # of an all-zero frame or row
FRAME_STEP = 1 / 127  # a frame is scaled to -1 to 1 and rounded to steps of this
MIDDLE = 128  # unsigned activations stand around it: x86 multiplies unsigned by signed 8-bit integers


def exporting() -> bool:
    """Whether a graph is traced for ONNX."""
    return bool(torch.onnx.is_in_onnx_export())


def constant(x: Tensor) -> Tensor:
    """``x`` as a constant of the traced graph, whatever it was computed from."""
    return torch.from_numpy(np.array(x.detach().cpu().numpy(), order="C"))


def _value(g: Any, value: float, dtype: torch.dtype = torch.float32) -> Any:
    return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))


def _rounded(g: Any, x: Any, scale: Any, zero: Any) -> Any:
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)


class FrameProduct(torch.autograd.Function):
    """``(x (..., I), weight (I, O) int8, scale_O)``: each frame of ``x`` in 8 bits with a scale of its own.

    The frame is divided by its largest magnitude before it is rounded and the product multiplied by it after:
    so all frames share the constant scale that onnxruntime's integer kernel asks for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_IO: Tensor, scale_O: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], weight_IO.shape[1])

    @staticmethod
    def symbolic(g: Any, x: Any, weight_IO: Any, scale_O: Any) -> Any:
        largest = g.op("ReduceMax", g.op("Abs", x), axes_i=[-1], keepdims_i=1)
        largest = g.op("Max", largest, _value(g, MIN_SCALE))
        step, zero = _value(g, FRAME_STEP), _value(g, MIDDLE, torch.uint8)
        frames = _rounded(g, g.op("Div", x, largest), step, zero)
        weight = g.op("DequantizeLinear", weight_IO, scale_O, axis_i=1)
        return g.op("Mul", g.op("MatMul", frames, weight), largest)


class StaticProduct(torch.autograd.Function):
    """``(x (..., I), weight (I, O) int8, scale_O, input_scale (), input_zero () uint8)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_IO: Tensor, scale_O: Tensor, input_scale: Tensor, input_zero: Tensor
    ) -> Tensor:
        return x.new_zeros(*x.shape[:-1], weight_IO.shape[1])

    @staticmethod
    def symbolic(g: Any, x: Any, weight_IO: Any, scale_O: Any, input_scale: Any, input_zero: Any) -> Any:
        weight = g.op("DequantizeLinear", weight_IO, scale_O, axis_i=1)
        return g.op("MatMul", _rounded(g, x, input_scale, input_zero), weight)


class GroupProduct(torch.autograd.Function):
    """``(x (..., I), packed (O, G, group / 2) uint8, scale_OG, I, group, axes of x)``: 4-bit weights.

    Not a standard operator: onnxruntime's own, which it has on every processor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale_OG: Tensor, in_features: int, group: int, axes: int
    ) -> Tensor:
        return x.new_zeros(*x.shape[:-1], packed.shape[0])

    @staticmethod
    def symbolic(g: Any, x: Any, packed: Any, scale_OG: Any, in_features: int, group: int, axes: int) -> Any:
        out_features = packed.type().sizes()[0]
        y = g.op(
            "com.microsoft::MatMulNBits",
            x,
            packed,
            scale_OG,
            K_i=in_features,
            N_i=out_features,
            bits_i=4,
            block_size_i=group,
        )
        # The tracer does not know this operator's shapes.
        sizes = x.type().sizes() or [None] * axes
        y.setType(x.type().with_sizes([*sizes[:-1], out_features]))
        return y


class Decoded(torch.autograd.Function):
    """``(weight int8, scale (C,), axis)`` as float32: for weights that are stored in 8 bits only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale_C: Tensor, axis: int) -> Tensor:
        return weight.float()

    @staticmethod
    def symbolic(g: Any, weight: Any, scale_C: Any, axis: int) -> Any:
        return g.op("DequantizeLinear", weight, scale_C, axis_i=axis)


class LookedUp(torch.autograd.Function):
    """``(ids, table (V, D) int8, scale_V)``: rows of a table, decoded where they are looked up."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor, scale_V1: Tensor) -> Tensor:
        return scale_V1.new_zeros(*ids.shape, table_VD.shape[1])

    @staticmethod
    def symbolic(g: Any, ids: Any, table_VD: Any, scale_V1: Any) -> Any:
        rows = g.op("Cast", g.op("Gather", table_VD, ids), to_i=1)
        return g.op("Mul", rows, g.op("Gather", scale_V1, ids))


class Lstm(torch.autograd.Function):
    """One layer, one direction: ``(x (B, T, I), input and state weights (1, 4H, .) int8, scales, bias)``.

    Gates in ONNX's order: input, output, forget, cell.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        input_1GI: Tensor,
        input_scale_G: Tensor,
        state_1GH: Tensor,
        state_scale_G: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return x_BTI.new_zeros(*x_BTI.shape[:2], state_1GH.shape[2])

    @staticmethod
    def symbolic(
        g: Any,
        x_BTI: Any,
        input_1GI: Any,
        input_scale_G: Any,
        state_1GH: Any,
        state_scale_G: Any,
        bias: Any,
    ) -> Any:
        weights = [
            g.op("DequantizeLinear", weight, scale, axis_i=1)
            for weight, scale in ((input_1GI, input_scale_G), (state_1GH, state_scale_G))
        ]
        frames = g.op("Transpose", x_BTI, perm_i=[1, 0, 2])
        size = state_1GH.type().sizes()[2]
        y_T1BH = g.op("LSTM", frames, *weights, bias, hidden_size_i=size, outputs=3)[0]
        y_TBH = g.op("Squeeze", y_T1BH, g.op("Constant", value_t=torch.tensor([1])))
        return g.op("Transpose", y_TBH, perm_i=[1, 0, 2])
