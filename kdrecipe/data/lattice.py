"""Moved to :mod:`kdrecipe.lattice`; this name goes with version 0.3."""

import warnings

from kdrecipe.lattice import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.lattice", DeprecationWarning, stacklevel=2)
