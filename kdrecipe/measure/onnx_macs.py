"""Multiply-accumulates of an ONNX file, counted from the shapes that it has while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.errors import KdrecipeError

AUDIO_S = 10.0  # of the utterance: attention's products grow by the square of its length
_FRAMES_PER_S = 100
_MATRIX = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "FusedMatMul": (0, 1)}
_MATRIX |= {"QLinearMatMul": (0, 3), "MatMulIntegerToFloat": (0, 1), "DynamicQuantizeMatMul": (0, 1)}
_CONV = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_RECURRENT = {"LSTM": 1, "GRU": 1, "RNN": 1}


def onnx_macs_per_second(path: Path, audio_s: float = AUDIO_S) -> float | None:
    """Multiply-accumulates per second of audio: matrix products, convolutions, recurrent layers.

    Counted on one utterance of ``audio_s``. Nodes within loops and branches are not counted.

    Args:
        path: a model whose inputs are features (1, T, F) float32 and lengths (1,) int64.
        audio_s: seconds.

    Returns:
        The number; None for files of another kind and models with other inputs.

    Raises:
        KdrecipeError: the file is damaged.
    """
    if path.suffix != ".onnx":
        return None
    import onnx
    import onnxruntime

    try:
        model = onnx.load(path)
        counted = [node for node in model.graph.node if _inputs_of(node)]
        known = {t.name: tuple(t.dims) for t in model.graph.initializer}
        wanted = {name for node in counted for name in (*_inputs_of(node), *node.output[:1]) if name}
        outputs = sorted(wanted - set(known) - {value.name for value in model.graph.input})
        kept = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in kept)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        # As it is written: fused nodes would have other tensors.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # protobuf's and onnxruntime's own types, one for every kind of damage
        raise KdrecipeError(f"not an ONNX model, or a damaged one: {error}", where=str(path)) from error
    feed = _utterance(session.get_inputs(), round(audio_s * _FRAMES_PER_S))
    if feed is None:
        return None
    shapes = known | {name: value.shape for name, value in feed.items()}
    for name, value in zip(outputs, session.run(outputs, feed), strict=True):
        shapes[name] = np.asarray(value).shape
    return sum(_macs(node, shapes) for node in counted) / audio_s


def _utterance(inputs: Sequence[Any], num_frames: int) -> dict[str, np.ndarray] | None:
    """Features and lengths for the inputs of a model; None where it has others."""
    feed: dict[str, np.ndarray] = {}
    for value in inputs:
        if value.type == "tensor(float)" and len(value.shape) == 3 and isinstance(value.shape[2], int):
            feed[value.name] = np.zeros((1, num_frames, value.shape[2]), dtype=np.float32)
        elif value.type == "tensor(int64)" and len(value.shape) == 1:
            feed[value.name] = np.array([num_frames], dtype=np.int64)
        else:
            return None
    return feed


def _inputs_of(node: Any) -> list[str]:
    """The names of the tensors whose shapes say how many products a node has; empty: it is not counted."""
    if node.op_type in _MATRIX:
        return [node.input[i] for i in _MATRIX[node.op_type]]
    if node.op_type in _CONV:
        return [node.input[_CONV[node.op_type]]]
    if node.op_type in _RECURRENT:
        return [node.input[0], node.input[1], node.input[2]]
    return [node.input[0]] if node.op_type == "MatMulNBits" else []


def _macs(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> float:
    inputs = [shapes[name] for name in _inputs_of(node)]
    if node.op_type in _RECURRENT:
        (num_steps, batch, _), weight, recurrent = inputs  # (directions, gates * hidden, inputs)
        return float(num_steps * batch * (math.prod(weight) + math.prod(recurrent)))
    out = math.prod(shapes[node.output[0]])
    options = {a.name: a.i for a in node.attribute}
    if node.op_type in _CONV:
        return float(out * math.prod(inputs[0][1:]))
    if node.op_type == "MatMulNBits":
        return float(out * options["K"])
    first = inputs[0]
    return float(out * (first[-2] if options.get("transA") and len(first) > 1 else first[-1]))
