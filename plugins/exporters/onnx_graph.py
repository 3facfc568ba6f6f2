"""Surgery on ONNX graphs: make them small, make them int8.

Both work on what torch wrote, whatever its node names are, and give plain ONNX operators.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

QMAX = 127  # symmetric: -128 stays unused, zero is exact
QMAX_REDUCED = 63  # sums of two products then fit the 16 bits that x86 without VNNI adds them in
MIN_SCALE = 1e-12
ROWS = {"Conv": (0, (1,)), "LSTM": (1, (1, 2))}
"""Operators that compute in float32 -> axis of output channels in their weights, inputs that are weights."""


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


def quantise(
    model: ModelProto,
    *,
    keep_float: Collection[bytes] = (),
    convs: bool = True,
    embeddings: bool = False,
    reduce_range: bool = False,
) -> ModelProto:
    """An int8 copy: products with constant matrices in integers, activations quantised as they come.

    A product ``MatMul(a, W)`` becomes ``MatMulInteger`` of 8-bit ``a`` (one scale per call) and int8
    ``W`` (one scale per column, symmetric), the pattern that onnxruntime runs as one kernel.
    Convolutions and LSTMs keep computing in float32, since few runtimes have integer ones, but their
    weights are stored as int8 (one scale per output channel), decoded when the model is loaded;
    embeddings (one scale per row), decoded row by row when they are looked up.

    Args:
        model: as :func:`slim` gives it.
        keep_float: ``tobytes()`` of matrices (I, O) that must stay as they are.
        convs: store the weights of convolutions and LSTMs as int8, too.
        embeddings: and those of embeddings.
        reduce_range: use 7 bits for the weights of products.
    """
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {t.name: t for t in graph.initializer}
    scales_of: dict[str, tuple[str, str, str]] = {}  # activation -> its 8-bit form, scale, zero point
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "MatMul" and weight is not None and len(weight.dims) == 2:
            matrix_IO = numpy_helper.to_array(weight)
            if matrix_IO.tobytes() not in keep_float:
                steps = QMAX_REDUCED if reduce_range else QMAX
                _set_int8(graph, weight.name, matrix_IO, axis=1, steps=steps)
                nodes.extend(_integer_product(node, scales_of))
                continue
        if convs and node.op_type in ROWS:
            axis, inputs = ROWS[node.op_type]
            for number in inputs:
                if (stored := weights.get(node.input[number])) is not None:
                    _set_int8(graph, stored.name, numpy_helper.to_array(stored), axis=axis, steps=QMAX)
                    nodes.extend(_decoded(stored.name))
                    node.input[number] = f"{stored.name}_d"
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if embeddings and table is not None and table.data_type == TensorProto.FLOAT and len(table.dims) == 2:
            _set_int8(graph, table.name, numpy_helper.to_array(table), axis=0, steps=QMAX)
            nodes.extend(_looked_up(node))
            continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_initialisers(graph)
    _shorten_names(graph)
    return result


def _integer_product(node: NodeProto, scales_of: dict[str, tuple[str, str, str]]) -> Iterator[NodeProto]:
    """The nodes that stand for ``MatMul(a, W)``; those that quantise ``a`` only the first time."""
    activation, weight = node.input
    out = node.output[0]
    if activation not in scales_of:
        # not _q and _s: the activation may be what another product or a look-up gives
        scales_of[activation] = (f"{activation}_dq", f"{activation}_ds", f"{activation}_dz")
        yield helper.make_node("DynamicQuantizeLinear", [activation], list(scales_of[activation]))
    quantised, scale, zero = scales_of[activation]
    # the weights' zero point is 0, the default
    yield helper.make_node("MatMulInteger", [quantised, f"{weight}_q", zero], [f"{out}_i"])
    yield helper.make_node("Cast", [f"{out}_i"], [f"{out}_f"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [scale, f"{weight}_s"], [f"{out}_s"])
    yield helper.make_node("Mul", [f"{out}_f", f"{out}_s"], [out])


def _decoded(weight: str) -> Iterator[NodeProto]:
    """``weight_d`` in float32. Not by DequantizeLinear: onnxruntime would run that at every call."""
    yield helper.make_node("Cast", [f"{weight}_q"], [f"{weight}_f"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{weight}_f", f"{weight}_s"], [f"{weight}_d"])


def _looked_up(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes that stand for ``Gather(table, ids)``."""
    (table, ids), out = node.input, node.output[0]
    yield helper.make_node("Gather", [f"{table}_q", ids], [f"{out}_q"])
    yield helper.make_node("Gather", [f"{table}_s", ids], [f"{out}_s"])
    yield helper.make_node("Cast", [f"{out}_q"], [f"{out}_f"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{out}_f", f"{out}_s"], [out])


def _set_int8(graph: GraphProto, name: str, weight: np.ndarray, axis: int, steps: int) -> None:
    """Add ``name_q`` (int8) and ``name_s`` (scales along ``axis``, broadcastable)."""
    if any(t.name == f"{name}_q" for t in graph.initializer):
        return
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.maximum(np.abs(weight).max(axis=others, keepdims=True) / steps, MIN_SCALE).astype(np.float32)
    quantised = np.clip(np.rint(weight / scales), -steps, steps).astype(np.int8)
    graph.initializer.append(numpy_helper.from_array(quantised, f"{name}_q"))
    graph.initializer.append(numpy_helper.from_array(scales.reshape(scales.shape[axis:]), f"{name}_s"))


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
            disabled_optimizers=["MatMulAddFusion"],  # Gemm would hide the products from quantise
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
    used = {name for node in _nodes(graph) for name in node.input}
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
