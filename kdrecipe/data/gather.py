"""Moved to :mod:`kdrecipe.corpus.gather`; this name goes with version 0.3."""

import warnings

from kdrecipe.corpus.gather import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.corpus.gather", DeprecationWarning, stacklevel=2)
