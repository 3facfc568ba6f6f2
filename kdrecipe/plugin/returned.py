"""What a plugin's method returned is what its interface says."""

from __future__ import annotations

from typing import Any, TypeVar

from kdrecipe.errors import PluginError

T = TypeVar("T")


def returned(value: Any, wanted: type[T], plugin: str, method: str) -> T:
    """``value``, if it is of the type that the core is about to rely on.

    Args:
        value: what the method returned.
        wanted: by the interface.
        plugin: kind and name, ``loss 'mine'``.
        method: its name.

    Raises:
        PluginError: it is of another type.
    """
    if isinstance(value, wanted):
        return value
    raise PluginError(
        f"{plugin}: {method} returned {type(value).__name__}, not {wanted.__name__}",
        remedy="see its kind in docs/hooks.md; kdrecipe plugins test NAME says what else is demanded",
    )
