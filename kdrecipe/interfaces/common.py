"""Constants and the base of plugins' options."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

BLANK_ID = 0
SOS_EOS_ID = 1
UNK_ID = 2

SAMPLE_RATE = 16000
"""Hz, of all audio that models hear."""

FRAME_SAMPLES = 160
"""Samples from one feature frame to the next: 0.01 s."""


class Located:
    """Marks options that are paths: ``path: Annotated[str, Located]``.

    They may hold ``${NAME}`` and ``~``, and count from the recipe's directory. What is no path that exists
    (the name of a model on a hub) reaches the plugin as it is written.
    """


class Options(BaseModel):
    """Base of every plugin's nested ``Config``: unknown keys are errors, numbers are finite, values do not
    change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
