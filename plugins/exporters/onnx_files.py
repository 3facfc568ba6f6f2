"""ONNX files of a model's parts, in fp32 and int8: traced, made small, quantised, written, opened."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import BundleLike, Options

from .onnx_graph import quantise, slim

OPSET = 17  # the first with LayerNormalization; any onnxruntime since 2022 reads it
EXAMPLE_LENS = [77, 50]  # feature frames of the batch that is traced
TOKENS = "tokens.txt"

Axes = Mapping[str, Sequence[str]]  # names of tensors and of their axes; an empty name: fixed


class OnnxOptions(Options):
    """Options of the ONNX exporters.

    Args:
        conv_weights: how the int8 files store the weights of convolutions, LSTMs and embeddings;
            they compute in float32 either way.
        reduce_range: 7 instead of 8 bits for the weights of matrix products, for x86 processors
            without VNNI (before 2019), whose 8-bit sums saturate; others lose precision by it.
    """

    conv_weights: Literal["int8", "float32"] = "int8"
    reduce_range: bool = False


@dataclass
class Part:
    """One file to be.

    Args:
        name: ``encoder`` is written to ``encoder.onnx`` and ``encoder.int8.onnx``.
        module: what it computes, of a model with float weights.
        example: its inputs, for the trace; sizes that vary are not 1.
        inputs: names of the inputs and their axes.
        outputs: names of the outputs and their axes.
        metadata: what runtimes and persons read in the file.
        quantised: whether there is an int8 file of it; without, both variants have the one in float.
    """

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: Axes
    outputs: Axes
    metadata: dict[str, str]
    quantised: bool = True


def file_names(*parts: str, float_parts: Collection[str] = ()) -> dict[str, dict[str, str]]:
    """Variant -> part -> file name, as :func:`write` writes them; ``float_parts`` are not quantised."""
    fp32 = {part: f"{part}.onnx" for part in parts}
    return {
        "fp32": fp32,
        "int8": {p: name if p in float_parts else f"{p}.int8.onnx" for p, name in fp32.items()},
    }


def write(
    parts: Sequence[Part], bundle: BundleLike, config: OnnxOptions, directory: Path
) -> dict[str, list[str]]:
    """Write every part in both variants, and ``tokens.txt``; an int8 bundle's weights stay exactly.

    Returns:
        Variant -> file names that ship with it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Layers that an int8 bundle left in float stay so; in a float bundle there is no choice yet.
    linears = [m for m in bundle.model.modules() if type(m) is nn.Linear] if bundle.is_int8 else []
    keep_float = {m.weight.detach().t().contiguous().numpy().tobytes() for m in linears}
    stored = config.conv_weights == "int8"
    sizes = {p: p.numel() for part in parts for p in part.module.parameters()}
    num_params = {"num_params": str(sum(sizes.values()))}  # of all files together
    files = file_names(*(p.name for p in parts), float_parts=[p.name for p in parts if not p.quantised])
    for part in parts:
        variants = {"fp32": slim(_traced(part))}
        if part.quantised:
            variants["int8"] = quantise(
                variants["fp32"],
                keep_float=keep_float,
                convs=stored,
                embeddings=stored,
                reduce_range=config.reduce_range,
            )
        for variant, model in variants.items():
            onnx.helper.set_model_props(model, part.metadata | num_params)
            onnx.checker.check_model(model)
            (directory / files[variant][part.name]).write_bytes(model.SerializeToString())
    shutil.copyfile(bundle.path / TOKENS, directory / TOKENS)
    return {variant: [*names.values(), TOKENS] for variant, names in files.items()}


def _traced(part: Part) -> onnx.ModelProto:
    """Trace with torch's older exporter: the newer one needs a package more, and its graphs of the
    same model differ from one torch version to the next."""
    buffer: Any = io.BytesIO()  # the older exporter takes one; torch's types know the newer one
    module = part.module.eval()
    axes = {**part.inputs, **part.outputs}
    # Warnings are about the exporter's age and about traced Python numbers, and the parity gate
    # finds any that matter.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            part.example,
            buffer,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes={
                name: {i: axis for i, axis in enumerate(names) if axis} for name, names in axes.items()
            },
            opset_version=OPSET,
            dynamo=False,
        )
        sizes = [tuple(x.shape) for x in module(*part.example)]
    exported = onnx.load_from_string(buffer.getvalue())
    _keep_unread(exported.graph, part)
    # The trace forgets some fixed sizes; sherpa-onnx reads the vocabulary's from here.
    for value, names, shape in zip(exported.graph.output, part.outputs.values(), sizes, strict=True):
        for dim, name, size in zip(value.type.tensor_type.shape.dim, names, shape, strict=True):
            if not name:
                dim.dim_value = size
    return exported


def _keep_unread(graph: onnx.GraphProto, part: Part) -> None:
    """Put inputs back that the trace dropped since nothing reads them: runtimes go by their order."""
    traced = {value.name: value for value in graph.input}
    for name, example in zip(part.inputs, part.example, strict=True):
        kind = onnx.helper.np_dtype_to_tensor_dtype(example.numpy().dtype)
        shape = [axis or size for axis, size in zip(part.inputs[name], example.shape, strict=True)]
        traced.setdefault(name, onnx.helper.make_tensor_value_info(name, kind, shape))
    del graph.input[:]
    graph.input.extend(traced[name] for name in part.inputs)


def example_batch(num_bins: int) -> tuple[Tensor, Tensor]:
    """Features (N, T, F) and their lengths, to trace encoders with."""
    return torch.zeros(len(EXAMPLE_LENS), max(EXAMPLE_LENS), num_bins), torch.tensor(EXAMPLE_LENS)


def metadata(bundle: BundleLike, model_type: str, **more: Any) -> dict[str, str]:
    """What is useful to a person, with what the runtime needs as ``more``."""
    kind = bundle.meta["model"]["name"]
    return {
        "model_type": model_type,
        "version": "1",
        "model_author": "kdrecipe",
        "comment": f"{kind} {'+'.join(bundle.meta['model']['heads'])}, system {bundle.name}",
        "vocab_size": str(len(bundle.tokens)),
        **{key: str(value) for key, value in more.items()},
    }


def session(path: Path, num_threads: int) -> onnxruntime.InferenceSession:
    """A file in onnxruntime, on the CPU.

    Raises:
        KdrecipeError: it is damaged.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, one for every kind of damage
        raise KdrecipeError(f"onnxruntime can't load the model: {error}", where=str(path)) from error


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> list[np.ndarray]:
    """The outputs of a model, all of them arrays."""
    return [np.asarray(output) for output in session.run(None, inputs)]
