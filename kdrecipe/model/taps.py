"""Intermediate tensors by declared name (``encoder.3``), captured only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kdrecipe.errors import PluginError, RecipeError, did_you_mean
from kdrecipe.interfaces import Tap


@contextmanager
def capture(declared: Mapping[str, Tap], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep what the modules behind ``names`` give.

    Args:
        declared: the model's taps by name.
        names: which of them to keep.

    Yields:
        name -> (B, T, D), filled as the modules run.

    Raises:
        RecipeError: a name that is not declared.
    """
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            if name not in declared:
                what = f"the model declares no tap {name!r}"
                raise RecipeError(what, remedy=did_you_mean(name, declared))
            hook = declared[name].module.register_forward_hook(_keeper(kept, name, declared[name].dim))
            hooks.callback(hook.remove)
        yield kept


def _keeper(kept: dict[str, Tensor], name: str, dim: int) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output
        if isinstance(value, Tensor) and value.dim() == 4:
            value = value.transpose(1, 2).flatten(2)
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[-1] != dim:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(output).__name__
            raise PluginError(f"tap {name!r} is declared as (B, T, {dim}), its module gave {got}")
        kept[name] = value

    return keep
