"""Outputs of modules within a model, kept while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def tapped(modules: Mapping[str, nn.Module], taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of ``modules`` by name, of those in ``taps``, once the model has run."""
    kept: dict[str, Tensor] = {}
    hooks = [modules[tap].register_forward_hook(_keep(kept, tap)) for tap in taps]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _keep(kept: dict[str, Tensor], tap: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept[tap] = output if isinstance(output, Tensor) else output[0]

    return hook
