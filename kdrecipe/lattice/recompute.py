"""Memory for time: what a function keeps for its gradient is computed again when it is needed.

``torch.utils.checkpoint`` does this too, but importing what it stands on takes 100 MB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(function: Callable[..., Tensor], device: torch.device, *arguments: object) -> Tensor:
    """``function(*arguments)``, which keeps nothing for the backward pass but its arguments.

    The function runs a second time in the backward pass, under the same autocast. It must do the same
    both times: no dropout.

    Args:
        function: of tensors and what else it likes; gradients also reach tensors that are not
            arguments (parameters of modules).
        device: that autocast is for.
        arguments: of the function.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    kind = device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    kept: dict[int, Tensor] = {}
    num_packed = 0

    def pack(tensor: Tensor) -> int:
        nonlocal num_packed
        num_packed += 1
        return num_packed - 1

    def unpack(number: int) -> Tensor:
        if number not in kept:
            kept.clear()
            with (
                torch.enable_grad(),  # type: ignore[no-untyped-call]
                torch.autocast(kind, dtype, enabled),
                saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                function(*arguments)
        return kept.pop(number)

    def keep(tensor: Tensor) -> Tensor:
        kept[len(kept)] = tensor.detach()  # itself would be a cycle, and never freed
        return kept[len(kept) - 1]

    with saved_tensors_hooks(pack, unpack):
        return function(*arguments)
