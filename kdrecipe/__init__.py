"""Knowledge distillation of speech recognition, from corpus to device."""

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("kdrecipe")
"""Marks a plugin's functions as implementations of the hooks in :mod:`kdrecipe.plugin.hookspecs`."""
