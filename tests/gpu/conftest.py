"""Tests that hold a device's results to the CPU's; ``tests/gpu.sh`` runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("DEVICE"):
        return
    skip = pytest.mark.skip(reason="no DEVICE is named: tests/gpu.sh runs these on a GPU")
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _float32_is_float32():
    """No TF32 in convolutions: results are compared with the CPU's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
