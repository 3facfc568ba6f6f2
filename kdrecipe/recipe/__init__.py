"""``recipe.yaml``: read with line numbers, checked as a whole before any work."""
