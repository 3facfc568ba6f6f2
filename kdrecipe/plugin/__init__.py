"""How plugins enter: hooks, registry, loader."""
