"""These tests compile Triton kernels, so they need a process that does not interpret them: ``make
test-emulator``.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/emulator: expected a process of its own without TRITON_INTERPRET=1: make test-emulator")
