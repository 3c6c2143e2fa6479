"""The self-check on compiled kernels: roundings of bf16 and fp16, sums of wgmma and TMA are as on a GPU.

What it says here is what a GPU should say.
"""

from __future__ import annotations

import emulated_gpu
import pytest
import torch

from eapo_kernels import selftest
from eapo_kernels.ops.verdicts import Question

pytestmark = [pytest.mark.aot, pytest.mark.skipif(torch.cuda.is_available(), reason="the command runs on the GPU")]


@pytest.mark.parametrize(
    ("backend", "dtype", "family", "line", "dim", "rows"),
    [
        ("triton", "bfloat16", "sm90", 4096, 136, 300),
        ("triton", "float16", "sm90", 2048, 136, 300),
        ("triton", "bfloat16", "sm80", 4096, 136, 300),
        ("cuda", "bfloat16", "sm90", 4096, 136, 300),
        ("triton", "bfloat16", "sm90", 4096, 2048, 30),
        ("cuda", "bfloat16", "sm90", 4096, 2048, 30),
    ],
)
def test_the_kernels_are_right(
    backend: str, dtype: str, family: str, line: int, dim: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged tiles, several row tiles; and a depth at which the truncated sums of tensor cores show."""
    emulated_gpu.pretend(monkeypatch, family=family, dim=line, seed=3, lateness=0.7)
    found = selftest.check(Question(backend, dtype, dim=dim, vocab=515), torch.device("cpu"), rows=rows)
    print(selftest.table(found))
    assert [(row.title, row.detail) for row in found if row.outcome != "right"] == []
    assert len(found) == 2 * len(selftest.CASES)
    assert max(row.error for row in found) <= 0.6, "what a GPU may do worse than the emulator has room"
