"""Chunk sizes are pure functions of shapes and budget: they fit, they cover, they are even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eapo_kernels import EapoError, Options
from eapo_kernels.ops import chunking
from eapo_kernels.ops.chunking import workspace_bytes


@given(st.integers(1, 10**6), st.integers(1, 2**21), st.integers(1, 2**34))
def test_row_chunks_fit_the_budget(n_rows: int, bytes_per_row: int, budget: int) -> None:
    if budget < bytes_per_row:
        with pytest.raises(EapoError, match="the workspace of one row"):
            chunking.row_chunk(n_rows, bytes_per_row, budget)
        return
    chunk = chunking.row_chunk(n_rows, bytes_per_row, budget)
    assert chunk >= 1
    assert chunk * bytes_per_row <= budget
    assert chunk >= min(n_rows, budget // bytes_per_row) / 2


@given(st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([2, 4, 8, 14]), st.integers(2**16, 2**34))
def test_slabs_fit_the_budget(n_rows: int, vocab: int, size: int, budget: int) -> None:
    rows, columns = chunking.slab(n_rows, vocab, size, budget)
    assert 1 <= rows <= max(n_rows, 64)
    assert 1 <= columns <= vocab
    assert rows * columns * size <= budget


def test_even_chunks() -> None:
    assert chunking.row_chunk(2048, 4, 4 * 1365) == 1024
    assert chunking.row_chunk(2048, 4, 4 * 4096) == 2048
    assert chunking.slab(2048, 49152, 4, 2**28) == (2048, 24576)


@pytest.mark.parametrize(
    ("device", "budget"),
    [(None, 2**29), (4 * 2**30, 2**28), (24 * 2**30, 2**29), (80 * 2**30, 2**31), (141 * 10**9, 2**31)],
)
def test_the_default_budget_follows_the_device(device: int | None, budget: int) -> None:
    assert chunking.default_budget(device) == budget
    assert workspace_bytes(Options(), torch.device("cpu")) == 2**29
    assert workspace_bytes(Options(12), torch.device("cpu")) == 12


def test_devices_of_nearly_one_size_have_one_default_budget() -> None:
    """Otherwise the ranks of a split head would cut different chunks and deadlock."""
    for nominal in (16, 24, 32, 40, 48, 80):
        budgets = {chunking.default_budget(int(nominal * 2**30 * share)) for share in (0.93, 0.95, 0.97, 0.99)}
        assert len(budgets) == 1


@pytest.mark.parametrize(
    ("n", "vocab", "size", "name", "rows"),
    [
        (8192, 128256, 2, "one_chunk", 8192),
        (8192, 151936, 2, "chunks", 4096),
        (8192, 262144, 2, "chunks", 2752),
        (8192, 128256, 6, "chunks", 2752),
        (8192, 151936, 6, "chunks", 2048),
    ],
)
def test_large_devices_get_long_chunks(n: int, vocab: int, size: int, name: str, rows: int) -> None:
    """bf16. size: bytes a logit, of the scaled-exponential form (and 8 of sums a tile) or of the torch backend on CUDA."""
    row_bytes = chunking.padded(vocab) * size + 8 * -(-vocab // 256) * (size == 2)
    plan = chunking.one_pass(n, row_bytes, chunking.default_budget(141 * 10**9))
    assert plan == chunking.Plan(name, rows, 3)


@pytest.mark.parametrize("slab_bytes", [2, 14], ids=["triton", "torch"])
@pytest.mark.parametrize(("vocab", "limit"), [(131072, 2**28), (262144, 2**29)])
def test_the_plan_of_least_memory(vocab: int, limit: int, slab_bytes: int) -> None:
    """N = D = 4096 in bf16: slab of logit gradients, fp32 d_hidden and fp32 slab of d_weight within 0.25 (0.5) GiB."""
    n = d = 4096
    budget = workspace_bytes(Options(plan="recompute"), torch.device("cpu"))
    rows, columns = chunking.slab(n, vocab, slab_bytes, budget)
    assert rows * columns * slab_bytes + 4 * n * d + 4 * chunking.weight_slab(vocab, d) * d <= limit
    assert workspace_bytes(Options(2**20, plan="recompute"), torch.device("cpu")) == 2**20
