"""Triton kernels are interpreted where there is no GPU. TRITON_INTERPRET must be set before triton is imported.

So the conftest of every folder whose tests import triton imports this first. tests/aot compiles, in a process of its own.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

import pytest
import torch


def refuse_broken_pair() -> None:
    """The interpreter of triton 3.6 converts arrays of one element to numbers, which numpy 2.4 refuses."""
    try:
        found = {name: metadata.version(name) for name in ("triton", "numpy")}
    except metadata.PackageNotFoundError:
        return
    triton, numpy = (tuple(int(part) for part in version.split(".")[:2]) for version in found.values())
    if triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError(
            f"interpreted kernels: expected triton >= 3.7 or numpy < 2.4, got triton {found['triton']}, numpy {found['numpy']}"
        )


if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1: expected this folder's tests first or alone")
    refuse_broken_pair()
    os.environ["TRITON_INTERPRET"] = "1"
