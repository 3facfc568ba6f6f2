"""Moved to :mod:`kdrecipe.corpus.manifests`; this name goes with version 0.3."""

import warnings

from kdrecipe.corpus.manifests import *  # noqa: F403

warnings.warn(f"{__name__} has moved: import kdrecipe.corpus.manifests", DeprecationWarning, stacklevel=2)
