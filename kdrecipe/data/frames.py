"""Moved to :mod:`kdrecipe.frames`; this name goes with version 0.3."""

import warnings

from kdrecipe.frames import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.frames", DeprecationWarning, stacklevel=2)
