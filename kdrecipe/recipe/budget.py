"""``budget``: what a compressed system may cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdrecipe.interfaces import Options

Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Budget(Options):
    """One bound, which is met from 0 to 2 % below.

    Args:
        size_mb: 10^6 bytes of the exported model's files, as they ship.
        params: number of weights, those in int8 included.
        macs_per_s: multiply-accumulates per second of audio, see :mod:`kdrecipe.measure.macs`.
        rtf: seconds of work per second of audio of the exported model, one thread, this machine: the median.
    """

    size_mb: Limit | None = None
    params: Limit | None = None
    macs_per_s: Limit | None = None
    rtf: Limit | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if len(self.model_fields_set) != 1 or None in self.model_dump(exclude_unset=True).values():
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def measure(self) -> str:
        """Which of the four it is."""
        return next(iter(self.model_fields_set))

    @property
    def limit(self) -> float:
        """Of that."""
        return float(getattr(self, self.measure))
