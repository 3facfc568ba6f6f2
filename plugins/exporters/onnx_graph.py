"""Surgery on ONNX graphs: make them small.

It works on what torch wrote, whatever its node names are, and gives plain ONNX operators.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

WORTH_HALVING = 64  # numbers; below, a node more costs more than the bytes


def slim(model: ModelProto) -> ModelProto:
    """Fold constants, merge equal ones, drop all names and notes: the same function in less space."""
    _split_gemms(model.graph)
    for _ in range(2):  # equal constants merged, onnxruntime finds more equal nodes
        model = _folded(model)
        _merge_initialisers(model.graph)
    for node in _nodes(model.graph):
        node.ClearField("name")
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    domains = {node.domain for node in _nodes(model.graph)} | {""}
    used = [opset for opset in model.opset_import if opset.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)
    _shorten_names(model.graph)
    return model


def decode_at_load(model: ModelProto) -> ModelProto:
    """Let weights that are only stored in 8 bits be decoded when the model is loaded, in place.

    A layer that computes in float traces them through DequantizeLinear, which onnxruntime would run at
    every call; Cast and Mul of constants it computes once. Weights of products stay as they are: with
    their 8-bit activations onnxruntime makes them one integer kernel.
    """
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    integer = {
        n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in stored
    }
    of_products = {
        name for n in graph.node if n.op_type == "MatMul" and n.input[0] in integer for name in n.input
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or node.output[0] in of_products:
            nodes.append(node)
            continue
        (axis,) = (a.i for a in node.attribute if a.name == "axis")
        scales = numpy_helper.to_array(stored[node.input[1]])
        name = f"{node.output[0]}_s"
        trailing = (-1, *[1] * (len(weight.dims) - axis - 1))
        graph.initializer.append(numpy_helper.from_array(scales.reshape(trailing), name))
        floats = f"{node.output[0]}_f"
        nodes.append(helper.make_node("Cast", [weight.name], [floats], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [floats, name], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_initialisers(graph)
    _shorten_names(graph)
    return model


def halve(model: ModelProto) -> ModelProto:
    """A copy whose large constants are stored as float16, decoded when it is loaded: it computes in float32.

    Runtimes on CPUs compute in float32 anyway, so that nothing but the weights is rounded.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    casts: list[NodeProto] = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and values.size >= WORTH_HALVING:
            if np.abs(values).max() > np.finfo(np.float16).max:
                continue
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_h"))
            casts.append(helper.make_node("Cast", [f"{name}_h"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _shorten_names(graph)
    return result


def _folded(model: ModelProto) -> ModelProto:
    """After onnxruntime's portable optimisations (those that give standard operators only)."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],  # Gemm has no integer kernel with scales per column
        )
        folded = onnx.load(path)
    folded.ir_version = model.ir_version
    return folded


def _split_gemms(graph: GraphProto) -> None:
    """``Gemm`` of a constant matrix, which is how a linear layer of (N, I) is traced, as product and sum."""
    weights = {t.name: t for t in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = weights.get(node.input[1]) if node.op_type == "Gemm" else None
        plain = (options.pop("alpha", 1.0), options.pop("beta", 1.0), options.pop("transA", 0)) == (
            1.0,
            1.0,
            0,
        )
        if weight is None or not plain:
            nodes.append(node)
            continue
        matrix_IO = numpy_helper.to_array(weight)
        if options.get("transB"):
            matrix_IO = np.ascontiguousarray(matrix_IO.T)
        out, name = node.output[0], f"{node.output[0]}_w"
        graph.initializer.append(numpy_helper.from_array(matrix_IO, name))
        has_bias = len(node.input) == 3
        product = f"{out}_p" if has_bias else out
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product]))
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [out]))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_initialisers(graph)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those within If and Loop included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _merge_initialisers(graph: GraphProto) -> None:
    """Let equal constants be one."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same_as: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        same_as[tensor.name] = first.setdefault(key, tensor.name)
        if same_as[tensor.name] == tensor.name:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in _nodes(graph):
        node.input[:] = [same_as.get(name, name) for name in node.input]


def _drop_unused_initialisers(graph: GraphProto) -> None:
    used = {name for node in _nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _shorten_names(graph: GraphProto) -> None:
    """Call every tensor but the graph's inputs and outputs by a short number."""
    names: dict[str, str] = {"": "", **{v.name: v.name for v in itertools.chain(graph.input, graph.output)}}
    counter = itertools.count()

    def short(name: str) -> str:
        if name not in names:
            names[name] = np.base_repr(next(counter), 36)
        return names[name]

    def rename(part: GraphProto) -> None:
        for tensor in part.initializer:
            tensor.name = short(tensor.name)
            tensor.ClearField("doc_string")
        for node in part.node:
            node.input[:] = [short(name) for name in node.input]
            node.output[:] = [short(name) for name in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g)
                    for value in itertools.chain(attribute.g.input, attribute.g.output):
                        value.name = short(value.name)

    rename(graph)
