"""Tensors within data classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def map_tensors(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``item`` (a dataclass) with ``change`` applied to each tensor in it, also within dicts and dataclasses.

    Fields that are no arguments (``init=False``: kept results) start empty.
    """
    import torch

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            return {k: one(v) for k, v in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return map_tensors(value, change)
        return value

    return replace(item, **{f.name: one(getattr(item, f.name)) for f in fields(item) if f.init})
