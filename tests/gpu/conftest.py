"""Tests that matter with a GPU. Without one they run their own logic at tiny sizes, with
interpreted Triton kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import interpreted  # noqa: F401
import pytest
import torch


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Every test starts with the memory of the one before it given back, so that processes beside
    this one can have it."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
