"""Exported models: the parity gate, and speed and memory in the runtime."""
