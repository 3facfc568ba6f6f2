"""Layers whose weights are stored in 8 bits and that compute in float: convolutions, LSTMs, embeddings.

Few runtimes have integer kernels for them, and few of a recogniser's products are theirs; their bytes count
all the same. ``weight`` is what the stored integers stand for, so that whoever reads it finds numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onnx_ops
from .integer_layers import rows_to_int8

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

Conv = nn.Conv1d | nn.Conv2d
GATES_IN_ONNX = (0, 3, 1, 2)  # torch's are input, forget, cell, output


def decoded(integers: Tensor, scale_C: Tensor, axis: int = 0) -> Tensor:
    """Float weights of integers with a scale for each place along ``axis``."""
    if onnx_ops.exporting():
        constants = onnx_ops.constant(integers), onnx_ops.constant(scale_C)
        found: Tensor = onnx_ops.Decoded.apply(*constants, axis)  # type: ignore[no-untyped-call]
        return found
    return integers.float() * scale_C.view([-1 if i == axis else 1 for i in range(integers.dim())])


class StoredConv(nn.Module):
    """A convolution over one or two axes; a scale per output channel.

    State: ``integers`` in the shape of its weight, ``scale_O``, ``bias`` or None.
    """

    number_format: ClassVar[str] = "int8"
    scale_O: Tensor

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        device = conv.weight.device
        self.kind, self.options = type(conv), _options(conv)
        empty = torch.zeros(conv.weight.shape, dtype=torch.int8, device=device)
        self.integers = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("scale_O", torch.ones(len(empty), device=device))
        bias = None if conv.bias is None else conv.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def like(cls, conv: Conv) -> Self:
        """Empty, in the shape of ``conv``."""
        return cls(conv)

    @classmethod
    def from_float(cls, conv: Conv) -> Self:
        """Round the weights."""
        new = cls(conv)
        new.integers.data, new.scale_O = rows_to_int8(conv.weight)
        return new.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """What the integers stand for."""
        return decoded(self.integers, self.scale_O)

    def to_float(self) -> nn.Module:
        """The convolution with the same (rounded) weights in float32."""
        (out, per_group), groups = self.integers.shape[:2], self.options["groups"]
        kernel = tuple(self.integers.shape[2:])
        conv = self.kind(per_group * groups, out, kernel, bias=self.bias is not None, **self.options)  # type: ignore[arg-type]
        conv.weight.data = self.weight
        if conv.bias is not None and self.bias is not None:
            conv.bias.data = self.bias.detach().clone()
        return conv.requires_grad_(False).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        convolve: Any = F.conv1d if self.integers.dim() == 3 else F.conv2d
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = convolve(x, self.weight.to(x.dtype), bias, **self.options)
        return y


def _options(conv: Conv) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}


class StoredEmbedding(nn.Module):
    """A table with a scale per row. State: ``integers`` (V, D), ``scale_V1``."""

    number_format: ClassVar[str] = "int8"
    scale_V1: Tensor

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, dim
        empty = torch.zeros(num_embeddings, dim, dtype=torch.int8)
        self.integers = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("scale_V1", torch.ones(num_embeddings, 1))

    @classmethod
    def like(cls, table: nn.Embedding) -> Self:
        """Empty, in the shape of ``table``."""
        return cls(table.num_embeddings, table.embedding_dim).to(table.weight.device)

    @classmethod
    def from_float(cls, table: nn.Embedding) -> Self:
        """Round the rows."""
        new = cls.like(table)
        new.integers.data, scale_V = rows_to_int8(table.weight)
        new.scale_V1 = scale_V[:, None]
        return new.train(table.training)

    @property
    def weight(self) -> Tensor:
        """What the integers stand for."""
        return decoded(self.integers, self.scale_V1.squeeze(1))

    def to_float(self) -> nn.Embedding:
        """The table with the same (rounded) rows in float32."""
        table = nn.Embedding(self.num_embeddings, self.embedding_dim)
        table.weight.data = self.weight
        return table.requires_grad_(False).train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) to (..., D)."""
        if onnx_ops.exporting():
            constants = onnx_ops.constant(self.integers), onnx_ops.constant(self.scale_V1)
            found: Tensor = onnx_ops.LookedUp.apply(ids, *constants)  # type: ignore[no-untyped-call]
            return found
        return self.integers[ids].float() * self.scale_V1[ids]


class StoredLstm(nn.Module):
    """An ``nn.LSTM`` of one layer and one direction, batch first, with biases; a scale per gate's output.

    State: ``input_GI`` and ``state_GH`` int8, their scales (G = 4H, torch's order of gates), ``bias_2G``.
    """

    number_format: ClassVar[str] = "int8"
    input_scale_G: Tensor
    state_scale_G: Tensor

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        gates = 4 * hidden_size
        for name, size in (("input_GI", input_size), ("state_GH", hidden_size)):
            empty = torch.zeros(gates, size, dtype=torch.int8)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_buffer("input_scale_G", torch.ones(gates))
        self.register_buffer("state_scale_G", torch.ones(gates))
        self.bias_2G = nn.Parameter(torch.zeros(2, gates), requires_grad=False)

    @staticmethod
    def suits(lstm: nn.LSTM) -> bool:
        """Whether it is of this kind."""
        return lstm.num_layers == 1 and not lstm.bidirectional and lstm.batch_first and lstm.bias

    @classmethod
    def like(cls, lstm: nn.LSTM) -> Self:
        """Empty, in the shape of ``lstm``."""
        return cls(lstm.input_size, lstm.hidden_size).to(next(lstm.parameters()).device)

    @classmethod
    def from_float(cls, lstm: nn.LSTM) -> Self:
        """Round the weights."""
        new = cls.like(lstm)
        of_input, of_state, *biases = lstm.parameters()
        new.get_parameter("input_GI").data, new.input_scale_G = rows_to_int8(of_input)
        new.get_parameter("state_GH").data, new.state_scale_G = rows_to_int8(of_state)
        new.bias_2G.data = torch.stack([b.detach().float() for b in biases])
        return new.train(lstm.training)

    def _weights(self) -> list[Tensor]:
        return [
            decoded(self.get_parameter("input_GI"), self.input_scale_G),
            decoded(self.get_parameter("state_GH"), self.state_scale_G),
            *self.bias_2G,
        ]

    def to_float(self) -> nn.LSTM:
        """The LSTM with the same (rounded) weights in float32."""
        lstm = nn.LSTM(self.input_size, self.hidden_size, batch_first=True)
        for param, value in zip(lstm.parameters(), self._weights(), strict=True):
            param.data = value.detach().clone()
        return lstm.requires_grad_(False).train(self.training)

    def forward(
        self, x_BTI: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) to (B, T, H) and the last state."""
        if onnx_ops.exporting() and state is None:
            zeros = x_BTI.new_zeros(1, x_BTI.shape[0], self.hidden_size)
            return self._in_onnx(x_BTI), (zeros, zeros)  # nobody reads the state of a graph's LSTM
        if state is None:
            zeros = x_BTI.new_zeros(1, x_BTI.shape[0], self.hidden_size)
            state = zeros, zeros
        weights = [w.to(x_BTI.dtype) for w in self._weights()]
        y_BTH, *last = torch._VF.lstm(x_BTI, state, weights, True, 1, 0.0, False, False, True)  # type: ignore[attr-defined]
        return y_BTH, (last[0], last[1])

    def _in_onnx(self, x_BTI: Tensor) -> Tensor:
        def ordered(x_G: Tensor) -> Tensor:
            gates = x_G.detach().view(4, self.hidden_size, *x_G.shape[1:])
            return gates[list(GATES_IN_ONNX)].flatten(0, 1)

        constants = [
            ordered(self.get_parameter("input_GI"))[None],
            ordered(self.input_scale_G),
            ordered(self.get_parameter("state_GH"))[None],
            ordered(self.state_scale_G),
            torch.cat([ordered(b) for b in self.bias_2G])[None],
        ]
        y: Tensor = onnx_ops.Lstm.apply(x_BTI, *map(onnx_ops.constant, constants))  # type: ignore[no-untyped-call]
        return y
