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
    ("backend", "dtype", "family", "dim"),
    [
        ("triton", "bfloat16", "sm90", 4096),
        ("triton", "bfloat16", "sm90", 2048),
        ("triton", "float16", "sm90", 4096),
        ("triton", "bfloat16", "sm80", 4096),
        ("cuda", "bfloat16", "sm90", 4096),
        ("cuda", "float16", "sm90", 4096),
    ],
)
def test_the_kernels_are_right(backend: str, dtype: str, family: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_gpu.pretend(monkeypatch, family=family, dim=dim, seed=3, lateness=0.7)
    rows = selftest.check(Question(backend, dtype, dim=136, vocab=515), torch.device("cpu"))
    assert [(row.title, row.detail) for row in rows if row.outcome != "right"] == []
    assert len(rows) == 2 * len(selftest.CASES)
    print(selftest.table(rows, []))
