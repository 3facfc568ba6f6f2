"""Where an ONNX file begins to compute something else than its bundle.

Names of tensors are lost when a file is made small, so the output of a layer is looked for by its values:
among the file's tensors of the same shape, the closest one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe.errors import KdrecipeError

CLOSE = 1e-3  # relative distance of one tensor computed twice in float32
CLOSE_INTEGERS = 0.1  # of which one is computed in integers


@dataclass(frozen=True)
class Parting:
    """How far the file is from the bundle after a layer.

    Args:
        layer: name of the module.
        distance: of the closest tensor: norm of the difference over norm.
    """

    layer: str
    distance: float


@torch.no_grad()
def distances(model: Any, features_TF: np.ndarray, file: Path) -> list[Parting]:
    """For each layer of the encoder, in the order in which they run, the distance of its closest tensor.

    Args:
        model: of the bundle, on the CPU, in evaluation mode.
        features_TF: log-mel of one utterance.
        file: the encoder, or the whole CTC model; inputs are features and lengths.

    Raises:
        KdrecipeError: the file is damaged or has other inputs.
    """
    outputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not any(module.children()) and any(True for _ in module.parameters()):
                hooks.callback(module.register_forward_hook(_keep(outputs, name)).remove)
        out = model.encode(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
        for head in model.heads.values():
            head(out.hidden_BTD, out.lens_B, None)
    tensors: dict[tuple[int, ...], list[np.ndarray]] = {}
    for array in _tensors(file, features_TF):
        tensors.setdefault(array.shape, []).append(array)
    found = []
    for name, output in outputs.items():
        wanted = output.numpy()
        norm = max(float(np.linalg.norm(wanted)), 1e-12)
        others = tensors.get(wanted.shape, [])
        if others:  # without: it is part of a larger operator there
            nearest = min(float(np.linalg.norm(np.nan_to_num(x, nan=np.inf) - wanted)) for x in others)
            found.append(Parting(name, nearest / norm))
    return found


def first_parting(found: list[Parting], close: float = CLOSE) -> Parting | None:
    """The first layer after which nothing in the file is ``close``; None: they never part."""
    return next((parting for parting in found if not parting.distance <= close), None)


def _keep(outputs: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and name not in outputs:
            outputs[name] = output.clone()  # what follows may work in place

    return keep


def _tensors(file: Path, features_TF: np.ndarray) -> list[np.ndarray]:
    """Every float tensor that a file computes for an utterance."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = {"x": features_TF[None].astype(np.float32), "x_lens": np.array([len(features_TF)], np.int64)}
    try:
        model = onnx.load(file)
        names = [name for node in model.graph.node for name in node.output if name]
        kept = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        inputs = dict(zip([value.name for value in session.get_inputs()], feed.values(), strict=True))
        arrays = session.run(names, inputs)
    except Exception as error:  # onnxruntime's own types, one for every kind of damage
        raise KdrecipeError(f"its tensors can't be looked at: {error}", where=str(file)) from error
    return [x for x in map(np.asarray, arrays) if x.dtype == np.float32]
