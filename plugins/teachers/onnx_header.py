"""What an ONNX file says of itself, without opening it in a runtime, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from kdrecipe.errors import RecipeError

from ..exporters import onnx_files

Shape = tuple[int | None, ...]

_WEIGHTS = frozenset(
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8")
)


@dataclass(frozen=True)
class Value:
    """An input or output: its numpy type and its axes, None where a size varies or is not said."""

    dtype: np.dtype
    shape: Shape


@dataclass(frozen=True)
class Header:
    """An ONNX file.

    Args:
        inputs: by name, in order.
        outputs: by name, in order.
        metadata: what its maker noted.
        num_params: numbers in its weights.
        files: it and those that hold weights for it.
    """

    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    metadata: Mapping[str, str]
    num_params: int
    files: tuple[Path, ...]


def read_header(path: Path) -> Header:
    """Read the graph of a file.

    Raises:
        RecipeError: there is no such file, it is not ONNX, or a file of its weights is missing.
    """
    if not path.is_file():
        raise RecipeError("there is no such file", where=str(path))
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache
def _read(path: Path, mtime_ns: int, size: int) -> Header:
    """Time and size are there so that the cache notices a change."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own
        raise RecipeError("not an ONNX file", where=str(path)) from error
    if not model.graph.output:
        raise RecipeError("not an ONNX file: it has no outputs", where=str(path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    places = [e.value for t in weights.values() for e in t.external_data if e.key == "location"]
    files = [path, *(path.parent / place for place in dict.fromkeys(places))]
    for file in files:
        if not file.is_file():
            raise RecipeError("there is no such file, it holds weights of the model", where=str(file))
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    counted = sum(prod(t.dims) for t in weights.values() if t.data_type in _WEIGHTS)
    return Header(
        {v.name: _value(v) for v in model.graph.input if v.name not in weights},
        {v.name: _value(v) for v in model.graph.output},
        metadata,
        counted,
        tuple(files),
    )


def _value(value: Any) -> Value:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return Value(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)


class OnnxSession:
    """An ONNX file that is given one utterance at a time, on the CPU.

    Args:
        path: of the file.
        input_name: its input.
        lens_name: the input that takes the utterance's length; None: there is none.
        num_threads: of onnxruntime.

    Raises:
        KdrecipeError: onnxruntime can't load it.
    """

    def __init__(self, path: Path, input_name: str, lens_name: str | None, num_threads: int) -> None:
        self._header = read_header(path)
        self._input, self._lens = input_name, lens_name
        self._session: onnxruntime.InferenceSession = onnx_files.session(path, num_threads)

    def run(self, utterance: Tensor) -> dict[str, Tensor]:
        """All outputs by name for (S,) or (T, F), each with the batch axis that it has."""
        inputs = self._header.inputs
        fed = {self._input: utterance[None].numpy().astype(inputs[self._input].dtype)}
        if self._lens is not None:
            fed[self._lens] = np.array([len(utterance)], dtype=inputs[self._lens].dtype)
        outputs = onnx_files.run(self._session, fed)
        return {name: torch.from_numpy(x) for name, x in zip(self._header.outputs, outputs, strict=True)}
