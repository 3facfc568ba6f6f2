"""Moved to :mod:`kdrecipe.corpus.audio`; this name goes with version 0.3."""

import warnings

from kdrecipe.corpus.audio import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.corpus.audio", DeprecationWarning, stacklevel=2)
