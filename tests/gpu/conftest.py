"""Tests that matter with a GPU. Without one they run their own logic at tiny sizes, with interpreted Triton kernels."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError("tests/gpu: triton was imported before TRITON_INTERPRET=1; run these tests first or alone")


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Every test starts with the memory of the one before it given back, so that processes beside this one can have it."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
