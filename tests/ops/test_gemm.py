"""Products keep fp32 accumulation whatever the operands are."""

from __future__ import annotations

import pytest
import torch

from eapo_kernels.ops import gemm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 20_000), (20_000, 3, 7), (4, 20_000, 6), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("overwrite", [True, False])
def test_add_product(dtype: torch.dtype, shape: tuple[int, int, int], overwrite: bool, device: str, poisoned: None) -> None:
    m, j, k = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, j, generator=generator).to(device, dtype)
    b = torch.randn(j, k, generator=generator).to(device, dtype)
    out = torch.full((m, k), float("nan")) if overwrite else torch.randn(m, k, generator=generator)
    out = out.to(device)
    expected = a.double() @ b.double() + (0 if overwrite else out.double())
    gemm.add_product_(out, a, b, overwrite=overwrite)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * j**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [1, 8191, 20_003])
def test_add_weighted_rows(dtype: torch.dtype, vocab: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, vocab, generator=generator).to(device, dtype)
    factor, out = (torch.randn(n, generator=generator).to(device) for n in (7, vocab))
    expected = out.double() + factor.double() @ matrix.double()
    gemm.add_weighted_rows_(out, matrix, factor)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_project_takes_the_weight_as_it_is(device: str) -> None:
    hidden, weight = torch.randn(5, 8, device=device), torch.randn(9, 8, device=device)
    out = torch.empty(5, 9, device=device)
    torch.testing.assert_close(gemm.project_(out, hidden, weight), hidden @ weight.T)


def test_scaled_rows_take_the_range_of_fp16(device: str) -> None:
    """Every size of factor, outliers, rows and factors of zero, and no rows at all."""
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(6)).half().to(device)
    rows[3] = 0.0
    rows[4, 7] = 65504.0
    for size in (1e-30, 1e-8, 1.0, 1e8, 1e20):
        factor = size * torch.randn(50, generator=torch.Generator().manual_seed(7)).to(device)
        factor[5] = 0.0
        scaled, unit = gemm.scale_rows(rows, factor, torch.float16)
        assert unit is not None
        assert 2**14 <= float(scaled.abs().max()) < 2**15
        exact = rows.double() * factor.double()[:, None]
        assert float((scaled.double() * unit.double() - exact).abs().max()) <= 2**-11 * float(exact.abs().max())
        assert (scaled[5] == 0).all()
    zeros, unit = gemm.scale_rows(rows, torch.zeros(50, device=device), torch.float16)
    assert unit == 1.0
    assert (zeros == 0).all()
    assert gemm.scale_rows(rows[:0], factor[:0], torch.float16)[0].shape == (0, 33)
    plain, unit = gemm.scale_rows(rows, factor, torch.float32)
    assert unit is None
    assert torch.equal(plain, rows * factor[:, None])
