"""TensorRT: an engine where the package ``tensorrt`` and a GPU are, otherwise what is needed to build one.

::

    model.trt.onnx  build_engine.sh  tokens.txt     and, where it was built, model.engine

The ONNX file has one utterance per call and known ranks throughout; ``T`` varies within the profile that
``build_engine.sh`` gives to ``trtexec``. An engine belongs to the kind of GPU and the version that built it.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from pydantic import Field

from kdrecipe import hookimpl
from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import KdrecipeError, MissingExtra
from kdrecipe.interfaces import BundleLike, Options, Runner

from . import onnx_files
from .feature_runner import FeatureRunner, write_notes
from .onnx_ctc import OnnxCtc
from .shared import existing

MODEL, ENGINE, SCRIPT = "model.trt.onnx", "model.engine", "build_engine.sh"
SHORTEST, USUAL = 16, 1000  # feature frames of the profile; the longest is an option


class TensorRtOptions(Options):
    """Options of the exporter ``tensorrt``.

    Args:
        longest_s: longest utterance of the engine; what is longer is recognised in pieces.
        build: the engine, where the package and a GPU are; otherwise only the ONNX file.
    """

    longest_s: float = Field(default=41.0, ge=1.0)
    build: bool = True


class TensorRt:
    """Exporter ``tensorrt``: encoder and ``ctc`` head."""

    head = "ctc"
    runtime = None
    variants: ClassVar = dict.fromkeys(("fp32", "engine"), onnx_files.VARIANTS["fp32"])
    files: ClassVar = {"fp32": {"model": MODEL}, "engine": {"model": ENGINE}}
    Config = TensorRtOptions

    def __init__(self, config: TensorRtOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the ONNX file and the command, and build the engine where that can be.

        Raises:
            KdrecipeError: no CTC head, a tensor without a known rank, or TensorRT refuses the model.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            OnnxCtc(OnnxCtc.Config(variants=("fp32",))).export(bundle, Path(name))
            model = _one_utterance(Path(name) / OnnxCtc.files["fp32"]["model"], bundle.name)
        write_atomic(directory / MODEL, model.SerializeToString())
        shutil.copyfile(bundle.path / onnx_files.TOKENS, directory / onnx_files.TOKENS)
        write_notes(bundle, directory)
        shapes = self._profile(int(bundle.meta["features"]["num_mel_bins"]))
        script = f"#!/bin/sh\n# Run it on the GPU that the engine is for.\n{command(shapes)}\n"
        write_atomic(directory / SCRIPT, script)
        shipped = {"fp32": [MODEL, onnx_files.TOKENS, SCRIPT]}
        if self.config.build and is_here():
            write_atomic(directory / ENGINE, build(directory / MODEL, shapes))
            shipped["engine"] = [ENGINE, onnx_files.TOKENS]
        return shipped

    @staticmethod
    def ships(number_formats: Collection[str]) -> str:
        """Floats, whatever the bundle has."""
        return "fp32"

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant: the ONNX file in onnxruntime, the engine in TensorRT.

        Raises:
            KdrecipeError: there is no such file.
            MissingExtra: the engine, where TensorRT is not.
        """
        model = existing(Path(directory) / self.files[variant]["model"])
        if variant == "engine":
            return FeatureRunner(_Engine(model), model.parent)
        session = onnx_files.session(model, num_threads)

        def run(features_1TF: np.ndarray, lens_1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            log_probs_1TV, out_lens_1 = onnx_files.run(session, {"x": features_1TF, "x_lens": lens_1})
            return log_probs_1TV, out_lens_1

        return FeatureRunner(run, model.parent)

    def _profile(self, num_bins: int) -> list[tuple[int, int, int]]:
        longest = round(100 * self.config.longest_s)
        return [(1, frames, num_bins) for frames in (min(SHORTEST, longest), min(USUAL, longest), longest)]


def command(shapes: Sequence[Sequence[int]]) -> str:
    """What ``trtexec`` is called with, for the smallest, the usual and the largest features."""
    least, usual, most = (f"x:{'x'.join(map(str, shape))},x_lens:1" for shape in shapes)
    return (
        f"trtexec --onnx={MODEL} --saveEngine={ENGINE} --noTF32 "
        f"--minShapes={least} --optShapes={usual} --maxShapes={most}"
    )


def is_here() -> bool:
    """Whether TensorRT and a GPU are."""
    return importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()


def _one_utterance(path: Path, name: str) -> onnx.ModelProto:
    """The model with a batch of one; every tensor has a known rank."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    known = {v.name for v in model.graph.value_info if v.type.tensor_type.HasField("shape")}
    known |= {v.name for v in model.graph.output}
    unknown = [out for node in model.graph.node for out in node.output if out and out not in known]
    if unknown:
        raise KdrecipeError(
            f"{len(unknown)} tensors have no known rank, which TensorRT needs; the first is {unknown[0]!r}",
            where=name,
            remedy="leave tensorrt out of export for this system",
        )
    return model


def build(path: Path, shapes: Sequence[tuple[int, int, int]]) -> bytes:
    """The engine of an ONNX file, in float32.

    Raises:
        KdrecipeError: TensorRT refuses the model; with its own words.
    """
    trt: Any = _package()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        raise KdrecipeError(f"TensorRT refuses the model: {parser.get_error(0)}", where=str(path))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # 10 bits of mantissa would not pass for float32
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *shapes)
    profile.set_shape("x_lens", (1,), (1,), (1,))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise KdrecipeError("TensorRT can't build an engine of the model", where=str(path))
    return bytes(plan)


class _Engine:
    """An engine on the GPU: features (1, T, F) and length (1,) to log-posteriors (1, T', V) and length."""

    def __init__(self, path: Path) -> None:
        trt: Any = _package()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise KdrecipeError(
                "it is of another GPU or another TensorRT", where=str(path), remedy=f"run {SCRIPT} here"
            )
        self._context = self._engine.create_execution_context()

    def __call__(self, features_1TF: np.ndarray, lens_1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tensors = {"x": torch.from_numpy(features_1TF).cuda(), "x_lens": torch.from_numpy(lens_1).cuda()}
        for name, value in tensors.items():
            self._context.set_input_shape(name, tuple(value.shape))
        for name, kind in (("log_probs", torch.float32), ("log_probs_len", torch.int64)):
            shape = tuple(self._context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=kind, device="cuda")
        for name, value in tensors.items():
            self._context.set_tensor_address(name, value.data_ptr())
        stream = torch.cuda.current_stream()
        self._context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return tensors["log_probs"].cpu().numpy(), tensors["log_probs_len"].cpu().numpy()


def _package() -> Any:
    if not is_here():
        raise MissingExtra("tensorrt", "an engine (with an NVIDIA GPU)", "pip install tensorrt")
    return importlib.import_module("tensorrt")


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("tensorrt", TensorRt)
