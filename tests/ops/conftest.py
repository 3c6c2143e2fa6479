"""Triton kernels are interpreted where there is no GPU, which must be settled before triton is imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError("tests/ops: triton was imported before TRITON_INTERPRET=1; run these tests first or alone")


@pytest.fixture
def narrow_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 operands stay fp16, as on CUDA, where the products multiply them: the CPU would widen them."""
    from comparison import keep_fp16

    keep_fp16(monkeypatch)
