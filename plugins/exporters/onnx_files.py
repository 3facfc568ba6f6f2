"""ONNX files of a model's parts, in every variant: traced, made small, written, opened.

A quantised layer writes itself (:mod:`kdrecipe_plugins.compressors.onnx_ops`), with the integers and the
scales that it computes with in torch.
"""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Bounds, BundleLike, CompressContext, Options, Variant, float_copy

from ..compressors.int4 import Int4
from ..compressors.int8_dynamic import Int8Dynamic
from .onnx_graph import decode_at_load, halve, slim

OPSET = 17  # the first with LayerNormalization; any onnxruntime since 2022 reads it
EXAMPLE_LENS = [77, 50]  # feature frames of the batch that is traced
TOKENS = "tokens.txt"

Axes = Mapping[str, Sequence[str]]  # names of tensors and of their axes; an empty name: fixed


class OnnxOptions(Options):
    """Options of the ONNX exporters.

    Args:
        variants: files to write; of a quantised bundle those in float, and always its own, which ships.
            ``int8`` and ``int4`` of a float bundle are what ``int8_dynamic`` and ``int4`` make of it.
    """

    variants: tuple[Literal["fp32", "fp16", "int8", "int4"], ...] = ("fp32", "int8")


_QUANTISED = (
    "keep layers in float (layers: or output_layer: false of the compressor), train with rounding (qat), "
    "ship the fp32 file, or on an x86 processor without VNNI set reduce_range: true of int8_dynamic"
)
_FLOATS = "the graph computes something else: look for Python numbers in forward() that tracing froze"

_INT8 = Bounds(max_kl=0.05, max_token_error=0.1, max_wer_increase=1.0, max_deletion_increase=1.0)
_INT4 = Bounds(max_kl=0.2, max_token_error=0.2, max_wer_increase=2.0, max_deletion_increase=2.0)
VARIANTS = {
    "fp32": Variant(Bounds(max_log_prob_diff=1e-3, max_token_error=0.01), _FLOATS, in_floats=True),
    "fp16": Variant(Bounds(max_kl=1e-3, max_token_error=0.02), _FLOATS, in_floats=True),
    "int4": Variant(_INT4, _QUANTISED),
    "int8_qdq": Variant(_INT8, _QUANTISED),
    "int8": Variant(_INT8, _QUANTISED),
}
OF_FORMAT = {"int8_static": "int8_qdq", "int4": "int4", "int8": "int8"}
"""Number format of a layer -> variant; of several, the first that a bundle has."""


def ships(number_formats: Collection[str]) -> str:
    """The variant that computes as a bundle does."""
    return next((v for layer, v in OF_FORMAT.items() if layer in number_formats), "fp32")


@dataclass
class Part:
    """One file to be.

    Args:
        name: ``encoder`` is written to ``encoder.onnx``, ``encoder.int8.onnx``, ...
        module: what it computes.
        example: its inputs, for the trace; sizes that vary are not 1.
        inputs: names of the inputs and their axes.
        outputs: names of the outputs and their axes.
        metadata: what runtimes and persons read in the file.
        quantised: whether variants differ in it; without, all have the file in float32.
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
    return {
        variant: {
            part: f"{part}.onnx" if variant == "fp32" or part in float_parts else f"{part}.{variant}.onnx"
            for part in parts
        }
        for variant in VARIANTS
    }


def write(
    make_parts: Callable[[nn.Module], Sequence[Part]],
    bundle: BundleLike,
    config: OnnxOptions,
    directory: Path,
) -> dict[str, list[str]]:
    """Write the parts of a bundle's model in each variant, and ``tokens.txt``.

    Returns:
        Variant -> file names that ship with it.

    Raises:
        KdrecipeError: a layer can't be written in ONNX.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    own = ships(bundle.number_formats)
    for variant in [*config.variants, *({own} - set(config.variants))]:
        model = _model(bundle, own, variant)
        if model is None:
            continue
        parts = make_parts(model)
        sizes = {p: p.numel() for part in parts for p in part.module.parameters()}
        num_params = {"num_params": str(sum(sizes.values()))}  # of all files together
        float_parts = [part.name for part in parts if not part.quantised]
        names = [*file_names(*(part.name for part in parts), float_parts=float_parts)[variant].values()]
        for part, name in zip(parts, names, strict=True):
            graph = decode_at_load(slim(_traced(part, bundle.name)))
            if variant == "fp16" and part.quantised:
                graph = halve(graph)
            onnx.helper.set_model_props(graph, part.metadata | num_params)
            onnx.checker.check_model(graph)
            (directory / name).write_bytes(graph.SerializeToString())
        written[variant] = [*names, TOKENS]
    shutil.copyfile(bundle.path / TOKENS, directory / TOKENS)
    return written


def _model(bundle: BundleLike, own: str, variant: str) -> nn.Module | None:
    """What a variant computes; None where the bundle has none such."""
    if variant == own:
        return bundle.model
    if VARIANTS[variant].in_floats:
        return float_copy(bundle.model)
    if own != "fp32":
        return None  # its integers are what they are
    cls: Any = {"int8": Int8Dynamic, "int4": Int4}[variant]
    compressor = cls(cls.Config())
    model: nn.Module = compressor.apply(copy.deepcopy(bundle.model), CompressContext(lambda: []))
    return model


def _traced(part: Part, system: str = "") -> onnx.ModelProto:
    """Trace with torch's older exporter: the newer one needs a package more, and its graphs of the
    same model differ from one torch version to the next."""
    buffer: Any = io.BytesIO()  # the older exporter takes one; torch's types know the newer one
    module = part.module.eval()
    axes = {**part.inputs, **part.outputs}
    # Warnings are about the exporter's age and about traced Python numbers, and the parity gate
    # finds any that matter.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
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
        except torch.onnx.errors.OnnxExporterError as error:
            raise KdrecipeError(
                f"the {part.name} can't be written in ONNX opset {OPSET}: {str(error).splitlines()[0]}",
                where=system,
                remedy="a layer of it uses an operator that ONNX lacks: write its forward() in others",
            ) from error
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
