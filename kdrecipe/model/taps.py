"""Intermediate tensors by declared name (``encoder.3``), captured only when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kdrecipe.errors import PluginError, RecipeError, did_you_mean


@contextmanager
def capture(declared: dict[str, tuple[nn.Module, int]], names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, keep what the modules behind ``names`` give.

    Args:
        declared: an encoder's ``taps()``: name -> (module, D).
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
                what = f"the encoder declares no tap {name!r}"
                raise RecipeError(what, remedy=did_you_mean(name, declared))
            module, dim = declared[name]
            hook = module.register_forward_hook(_keeper(kept, name, dim))
            hooks.callback(hook.remove)
        yield kept


def _keeper(kept: dict[str, Tensor], name: str, dim: int) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[-1] != dim:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PluginError(f"tap {name!r} is declared as (B, T, {dim}), its module gave {got}")
        kept[name] = output

    return keep
