"""Moved to :mod:`kdrecipe.corpus.problems`; this name goes with version 0.3."""

import warnings

from kdrecipe.corpus.problems import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.corpus.problems", DeprecationWarning, stacklevel=2)
