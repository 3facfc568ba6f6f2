"""Where the tests of this folder run, and how near to the CPU's a result must be there.

``DEVICE`` in the environment names the device: ``cuda``, or ``cpu`` for a dry run of the tests
themselves. Without it they are skipped.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from kdrecipe.testing.checks import contract_config

DEVICE = torch.device(os.environ.get("DEVICE") or "cpu")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
RELATIVE = 1e-4  # of float32 results: sums in another order
RELATIVE_GRADIENT = 1e-3
RELATIVE_HALF = 0.02  # of totals computed from bf16 or fp16 outputs

Mapped = TypeVar("Mapped")


def on_device(thing: Mapped) -> Mapped:
    """A batch, model output or targets with all tensors on the device."""
    moved: Mapped = thing.map(lambda x: x.to(DEVICE))  # type: ignore[attr-defined]
    return moved


def assert_close(got: Tensor | float, want: Tensor | float, relative: float, what: str) -> None:
    """Equal up to ``relative`` of the largest value (or of 1, if that is larger)."""
    got, want = (torch.as_tensor(x).detach().double().cpu() for x in (got, want))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, the CPU's is {tuple(want.shape)}"
    if want.numel() == 0:
        return
    assert bool(got.isfinite().all()) == bool(want.isfinite().all()), f"{what} is not finite"
    both = got.isfinite() & want.isfinite()
    worst = float((got - want).abs()[both].max()) if bool(both.any()) else 0.0
    scale = max(1.0, float(want.abs()[both].max())) if bool(both.any()) else 1.0
    assert worst <= relative * scale, f"{what} differs by {worst:.3g} from the CPU's, of {scale:.3g}"


def assert_same_fields(got: Any, want: Any, relative: float, what: str) -> None:
    """:func:`assert_close` on every tensor in a dataclass or mapping; whole numbers exactly."""
    fields = want.items() if isinstance(want, Mapping) else vars(want).items()
    for name, value in fields:
        other = got[name] if isinstance(want, Mapping) else getattr(got, name)
        if isinstance(value, Tensor):
            exact = not value.is_floating_point()
            assert_close(other, value, 0.0 if exact else relative, f"{what}.{name}")
        elif isinstance(value, Mapping) or hasattr(value, "lens_B"):
            assert_same_fields(other, value, relative, f"{what}.{name}")


def variants(cls: Any) -> Iterator[tuple[str, Any]]:
    """A plugin's options to test: those of its contract, and each choice of each option that is one.

    Yields:
        A name (``''``, ``direction=reverse``) and the configuration. Combinations that the plugin
        refuses are left out.
    """
    base = contract_config(cls, None)
    yield "", base
    hints = typing.get_type_hints(type(base))
    for name in type(base).model_fields:
        current = getattr(base, name)
        for value in _choices(hints[name]):
            if value == current:
                continue
            try:
                yield f"{name}={value}", type(base).model_validate({**base.model_dump(), name: value})
            except ValidationError:
                continue


def _choices(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (False, True)
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
