"""Corpora: manifests, audio, subsets, problems found in them."""
