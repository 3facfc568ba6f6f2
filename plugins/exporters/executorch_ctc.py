"""ExecuTorch: ``.pte`` files whose products run in XNNPACK, on phones and other Arm or x86 processors.

::

    model.pte  model.int8.pte  tokens.txt  features.json

One utterance per call: ``x`` (1, T, F) float32 log-mel features, not normalised, T a multiple of 4 (zeros
after the end), and ``x_lens`` (1,) int64, the frames that count; outputs: ``log_probs`` (1, T', V) and
``log_probs_len`` (1,).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import KdrecipeError, MissingExtra, Problem
from kdrecipe.interfaces import BundleLike, Options, Runner, Runtime, RuntimeSearch, float_copy

from .feature_runner import TOKENS, FeatureRunner, write_notes
from .onnx_files import VARIANTS
from .shared import CtcLogProbs, check_head, existing

INSTALL = "pip install 'kdrecipe[executorch]', in an environment of its own: it needs pytest below 9"
STEP = 4  # feature frames: lengths are multiples of it, or guards on shapes could not be decided
SHORTEST = 4 * STEP
EXAMPLE_FRAMES = 320


class ExecuTorchOptions(Options):
    """Options of the exporter ``executorch``.

    Args:
        longest_s: memory is laid out for utterances of this length; what is longer is recognised in pieces.
        int8: also write the int8 file: linear layers in integers, activations quantised as they come.
    """

    longest_s: float = Field(default=41.0, ge=1.0)
    int8: bool = True


class ExecuTorch:
    """Exporter ``executorch``: encoder and ``ctc`` head."""

    head = "ctc"
    runtime = Runtime(
        "executorch",
        "kdrecipe_plugins.exporters.executorch_runtime:start",
        {"ctc_greedy": RuntimeSearch("greedy_search")},
    )
    variants: ClassVar = {name: VARIANTS[name] for name in ("fp32", "int8")}
    files: ClassVar = {"fp32": {"model": "model.pte"}, "int8": {"model": "model.int8.pte"}}
    Config = ExecuTorchOptions

    def __init__(self, config: ExecuTorchOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the variants; int8 weights of an int8 bundle stay what they are, on the same grid.

        Raises:
            KdrecipeError: no CTC head, or torch can't export the model with lengths that vary.
            MissingExtra: ExecuTorch is not installed.
        """
        check_head(bundle, self.head, "executorch")
        check_installed()
        directory.mkdir(parents=True, exist_ok=True)
        module = _Contiguous(float_copy(bundle.model)).eval()
        num_bins = int(bundle.meta["features"]["num_mel_bins"])
        longest = STEP * round(100 * self.config.longest_s / STEP)
        shipped = {}
        for variant in ("fp32", "int8") if self.config.int8 else ("fp32",):
            name = self.files[variant]["model"]
            with _quiet(), _flatc():
                program = _exported(module, num_bins, longest, bundle.name)
                if variant == "int8":
                    program = _quantised(program, num_bins, longest)
                write_atomic(directory / name, _lowered(program, variant))
            shipped[variant] = [name, TOKENS]
        shutil.copyfile(bundle.path / TOKENS, directory / TOKENS)
        write_notes(bundle, directory)
        return shipped

    @staticmethod
    def ships(number_formats: Collection[str]) -> str:
        """int8 of layers in int8 with scales as activations come; of all others the twin in floats."""
        return "int8" if "int8" in number_formats else "fp32"

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant in ExecuTorch's Python runtime, whose number of threads is the process's.

        Raises:
            KdrecipeError: there is no such file, or it is damaged.
            MissingExtra: ExecuTorch is not installed.
        """
        model = existing(Path(directory) / self.files[variant]["model"])
        return FeatureRunner(Program(model, num_threads), model.parent)


class Program:
    """A ``.pte`` file: features (1, T, F) and length (1,) to log-posteriors (1, T', V) and length."""

    def __init__(self, path: Path, num_threads: int = 1) -> None:
        check_installed()
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime as Executor

        # Of the whole process; before the method is made ready, which asks for it.
        _unsafe_reset_threadpool(num_threads)
        try:
            self._program: Any = Executor.get().load_program(str(path))  # its method does not keep it
            self._method: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise KdrecipeError(f"ExecuTorch can't load the model: {error}", where=str(path)) from error

    def __call__(self, features_1TF: np.ndarray, lens_1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        num_frames = features_1TF.shape[1]
        missing = max(SHORTEST, num_frames + -num_frames % STEP) - num_frames
        padded_1TF = np.pad(features_1TF, ((0, 0), (0, missing), (0, 0)))
        found = self._method.execute([torch.from_numpy(padded_1TF), torch.from_numpy(lens_1)])
        log_probs_1TV, out_lens_1 = (tensor.numpy().copy() for tensor in found)  # the next call writes there
        return log_probs_1TV, out_lens_1


class _Contiguous(CtcLogProbs):
    """A model whose tensors have their axes in the usual order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.contiguous()
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                # Or operators after it would be given an order of axes that they do not know.
                module.register_forward_hook(lambda module, args, output: output.contiguous())


def check_installed() -> None:
    """MissingExtra unless ExecuTorch is installed."""
    if importlib.util.find_spec("executorch") is None:
        raise MissingExtra("executorch", "the exporter executorch", INSTALL)


def _example(num_bins: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, EXAMPLE_FRAMES, num_bins, generator=generator), torch.tensor([EXAMPLE_FRAMES])


def _shapes(longest: int) -> Any:
    steps = torch.export.Dim("steps", min=SHORTEST // STEP, max=longest // STEP)
    return ({1: STEP * steps}, None)


def _exported(module: nn.Module, num_bins: int, longest: int, name: str) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(module, _example(num_bins), dynamic_shapes=_shapes(longest))
    except Exception as error:  # torch's own types, one for every kind of obstacle
        first = str(error).strip().splitlines()[0]
        raise KdrecipeError(
            f"torch can't export the model with lengths that vary: {first}",
            where=name,
            remedy="leave executorch out of export for this system",
        ) from error


def _quantised(program: Any, num_bins: int, longest: int) -> Any:
    """The program with linear layers in integers: weights with a scale per output, inputs as they come."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    prepared = prepare_pt2e(program.module(), XNNPACKQuantizer().set_global(config))
    with torch.no_grad():
        prepared(*_example(num_bins))
        integers = convert_pt2e(prepared)
        return torch.export.export(integers, _example(num_bins), dynamic_shapes=_shapes(longest))


def _lowered(program: Any, variant: str) -> bytes:
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    partitioners = [XnnpackPartitioner()]
    if variant == "int8":
        dynamic = ConfigPrecisionType.DYNAMIC_QUANT
        partitioners.insert(0, XnnpackPartitioner(config_precisions=dynamic, per_op_mode=True))
    # Its check of operators knows none on symbolic lengths.
    config = EdgeCompileConfig(_check_ir_validity=False)
    lowered = to_edge_transform_and_lower(program, partitioner=partitioners, compile_config=config)
    content: bytes = lowered.to_executorch().buffer
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about what is experimental; what matters the parity gate finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _flatc() -> Iterator[None]:
    """With the program ``flatc`` of ExecuTorch, which lies beside this Python's, on the path."""
    with ExitStack() as undo:
        before = os.environ.get("PATH", "")
        undo.callback(os.environ.__setitem__, "PATH", before)
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
        yield


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("executorch", ExecuTorch)


@hookimpl
def check_recipe(recipe: Any) -> list[Problem]:
    """Without the package, stage 7 would fail after all the training."""
    if importlib.util.find_spec("executorch") is not None:
        return []
    return [
        Problem(
            "the exporter executorch needs the package 'executorch', which is not installed",
            recipe.document.where(("export", number)),
            INSTALL,
        )
        for number, exporter in enumerate(recipe.export)
        if exporter.name == "executorch"
    ]
