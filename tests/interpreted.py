"""Triton kernels are interpreted where there is no GPU, which must be settled before triton is imported.

So the conftest of every folder whose tests import triton imports this first. tests/aot compiles, in a process of its own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1: expected this folder's tests first or alone")
    os.environ["TRITON_INTERPRET"] = "1"
