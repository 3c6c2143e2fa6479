"""Chunk sizes are pure functions of shapes and budget: they fit, they cover, they are even."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eapo_kernels import EapoError
from eapo_kernels.ops import plans


@given(st.integers(1, 10**6), st.integers(1, 2**21), st.integers(1, 2**34))
def test_row_chunks_fit_the_budget(n_rows: int, bytes_per_row: int, budget: int) -> None:
    if budget < bytes_per_row:
        with pytest.raises(EapoError, match="the workspace of one row"):
            plans.row_chunk(n_rows, bytes_per_row, budget)
        return
    chunk = plans.row_chunk(n_rows, bytes_per_row, budget)
    assert chunk >= 1
    assert chunk * bytes_per_row <= budget
    assert chunk >= min(n_rows, budget // bytes_per_row) / 2


@given(st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([2, 4, 8, 14]), st.integers(2**16, 2**34))
def test_slabs_fit_the_budget(n_rows: int, vocab: int, size: int, budget: int) -> None:
    rows, columns = plans.slab(n_rows, vocab, size, budget)
    assert 1 <= rows <= max(n_rows, 64)
    assert 1 <= columns <= vocab
    assert rows * columns * size <= budget


def test_even_chunks() -> None:
    assert plans.row_chunk(2048, 4, 4 * 1365) == 1024
    assert plans.row_chunk(2048, 4, 4 * 4096) == 2048
    assert plans.slab(2048, 49152, 4, 2**28) == (2048, 24576)
