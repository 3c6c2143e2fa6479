"""The library that the tests of the headers call; and launches of kernels over rows, run in two ways."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import emulated_cuda
import pytest
from host_library import host, run_rows

from eapo_kernels.ops.cuda.launch import Launch

__all__ = ["host", "run"]


@pytest.fixture(params=["source", "compiled"])
def run(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Callable[[Launch], object]:
    """The maths of the headers by g++ over what a launch points to; or the compiled kernel itself on the emulator."""
    return emulated_cuda.run if request.param == "compiled" else lambda launch: run_rows(launch, host)
