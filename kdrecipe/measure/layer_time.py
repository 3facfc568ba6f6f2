"""The time of one matrix product in onnxruntime, in float and in integers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kdrecipe.measure.layer_changes import GROUP

NUM_RUNS = 15
MIN_S = 0.005  # of each run: short products are repeated within it


@functools.cache
def product_s(num_rows: int, inputs: int, outputs: int, kind: str) -> float | None:
    """Seconds that onnxruntime takes on one thread, at best of a few runs.

    Args:
        num_rows: of the activations, in one call.
        inputs: I.
        outputs: O.
        kind: ``fp32``; ``int8``: weights and activations in integers, activations quantised in the call;
            ``int4``: weights in 4 bits, products in float; ``prune``: half of the inputs.

    Returns:
        None if this onnxruntime does not have it.
    """
    import onnxruntime

    inputs = inputs // 2 if kind == "prune" and inputs > 1 else inputs
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            _graph(inputs, outputs, kind), options, providers=["CPUExecutionProvider"]
        )
        x_NI = np.random.default_rng(0).standard_normal((max(1, num_rows), inputs), dtype=np.float32)
        run = functools.partial(session.run, None, {"x": x_NI})
        run()
    except Exception:  # onnxruntime's own types: no such operator in this version
        return None
    return min(_seconds(run) for _ in range(NUM_RUNS))


def _seconds(run: Callable[[], object]) -> float:
    start, times = time.perf_counter(), 0
    while True:
        run()
        times += 1
        passed = time.perf_counter() - start
        if passed > MIN_S:
            return passed / times


def _graph(inputs: int, outputs: int, kind: str) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray]
    if kind == "int8":
        tensors = {
            "w": rng.integers(-127, 128, (inputs, outputs)).astype(np.int8),
            "s": np.ones((1, outputs), np.float32),
        }
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["xs", "s"], ["scale"]),
            helper.make_node("Mul", ["f", "scale"], ["y"]),
        ]
    elif kind == "int4":
        groups = -(-inputs // GROUP)
        tensors = {
            "w": rng.integers(0, 256, (outputs, groups, GROUP // 2)).astype(np.uint8),
            "s": np.ones(outputs * groups, np.float32),
        }
        options: dict[str, Any] = {"K": inputs, "N": outputs, "bits": 4, "block_size": GROUP}
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **options)]
    else:
        tensors = {"w": rng.standard_normal((inputs, outputs), dtype=np.float32)}
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model
