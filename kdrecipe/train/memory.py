"""What a batch takes in memory while a model trains on it, told from batches that are much smaller."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from kdrecipe.data.memory import available_bytes
from kdrecipe.model.asr import AsrModel
from kdrecipe.train.distribution import local_device
from kdrecipe.train.optimisation import autocast_dtype

PROBES = (300, 600, 1200)  # frames: three, since attention may take memory by the square
BEYOND_SAVED = 1.4  # peak over what the forward pass saves: 1.3 to 1.7 were measured, the more the smaller


def batch_bytes(model: AsrModel, num_frames: int, *, precision: str = "auto", num_views: int = 1) -> int:
    """About how much memory one utterance takes in training, forward and backward; weights not counted.

    What attention decoders and lattices of transducers add is not counted: they need a text.

    Args:
        model: in training mode, on this process's device.
        num_frames: feature frames of the utterance.
        precision: of the training options.
        num_views: differently augmented copies of it in the batch.
    """
    saved = [_saved_bytes(model, probe, precision) for probe in PROBES]
    expected = float(np.polyval(np.polyfit(PROBES, saved, 2), num_frames))
    return int(BEYOND_SAVED * num_views * max(expected, saved[-1]))


def free_bytes() -> int:
    """Memory that is free where this process trains."""
    device = local_device()
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def _saved_bytes(model: AsrModel, num_frames: int, precision: str) -> int:
    """Bytes that the forward pass of one utterance keeps for the backward pass."""
    device = model.norm.mean_F.device
    dtype = autocast_dtype(precision, device)
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # or storages that come later would take the same places

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    features_BTF = torch.zeros(1, num_frames, len(model.norm.mean_F), device=device)
    lens_B = torch.tensor([num_frames], device=device)
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast:
        out = model(features_BTF, lens_B)
        for logits_BTV in out.logits.values():
            logits_BTV.float().log_softmax(-1)  # as losses do
    return sum(sizes.values())
