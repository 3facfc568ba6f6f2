"""Multiply-accumulates of ONNX files, against numbers worked out by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdrecipe.errors import KdrecipeError
from kdrecipe.measure.onnx_macs import onnx_macs_per_second

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def write(path, nodes, tensors, inputs=(("x", FLOAT, [1, None, 8]), ("x_lens", INT64, [1]))):
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def f32(*shape):
    return np.ones(shape, np.float32)


def test_matrix_products_of_weights_and_of_activations(tmp_path):
    """100 frames per second: x W is 100 * 8 * 16, x x^T of an utterance of 10 s 1000 * 8 * 1000."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("MatMul", ["a", "h"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"w": f32(8, 16)})
    attention = (1000 * 8 * 1000 + 1000 * 1000 * 16) / 10
    assert onnx_macs_per_second(path) == 100 * 8 * 16 + attention
    shorter = onnx_macs_per_second(path, audio_s=1.0)
    assert shorter == 100 * 8 * 16 + 100 * 8 * 100 + 100 * 100 * 16


def test_integers_convolutions_and_recurrent_layers(tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),  # 100 * 8 * 4
        helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
        helper.make_node("Transpose", ["f"], ["c"], perm=[0, 2, 1]),
        # depthwise, stride 2: 50 frames, 4 channels, 3 taps
        helper.make_node("Conv", ["c", "k"], ["d"], group=4, strides=[2], pads=[1, 1]),
        helper.make_node("Transpose", ["d"], ["r"], perm=[2, 0, 1]),
        # both directions: 50 * 2 * (4 * 5) * (4 + 5)
        helper.make_node("LSTM", ["r", "in", "re"], ["y"], hidden_size=5, direction="bidirectional"),
    ]
    tensors = {"w": np.ones((8, 4), np.int8), "k": f32(4, 1, 3), "in": f32(2, 20, 4), "re": f32(2, 20, 5)}
    path = write(tmp_path / "m.onnx", nodes, tensors)
    assert onnx_macs_per_second(path) == 100 * 8 * 4 + 50 * 4 * 3 + 50 * 2 * 20 * 9


def test_other_files(tmp_path):
    assert onnx_macs_per_second(tmp_path / "model.pt") is None
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"w": f32(8, 2)}, [("x", FLOAT, [1, 8])])
    assert onnx_macs_per_second(path) is None, "no features: (N, F)"
    path.write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match="not an ONNX model"):
        onnx_macs_per_second(path)
