"""The offsets of the scaled-exponential form (csrc/row_offsets.cu) over a launch's arguments, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eapo_kernels.ops.cuda import rows
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.projection import Projection
from eapo_kernels.ops.triton.offsets import ScaledExpSums

pytestmark = [pytest.mark.csrc, pytest.mark.usefixtures("poisoned")]

Run = Callable[[Launch], object]
LOG2E = 1.4426950408889634
V = 60


def problem(n: int, dim: int, dtype: torch.dtype, bias: bool = False) -> tuple[Projection, Tensor]:
    """Rows 16-byte multiples apart, of any length; a temperature a row; strided bias."""
    g = torch.Generator().manual_seed(dim)
    stride = -(-dim // 8) * 8
    hidden, weight = (torch.randn(rows, stride, generator=g).to(dtype) for rows in (n, V))
    hidden[:, dim:], weight[:, dim:] = math.nan, math.nan  # behind the end: not to be read
    b = torch.randn(2 * V, generator=g).to(dtype)[::2] if bias else None
    temperature = 0.5 + torch.rand(n, generator=g)
    p = Projection(hidden[:, :dim], weight[:, :dim], b, row_inv_temperature=temperature, logit_scale=0.7)
    return p, torch.randint(V, (n,), generator=g)


def offsets_of(p: Projection, targets: Tensor, logp_guess: Tensor | None, run: Run) -> Tensor:
    sums = ScaledExpSums(
        torch.full((2, p.n_rows), math.nan), torch.empty(1, 1, 1), 256, torch.empty(1), torch.full((1,), 7).int()
    )
    run(rows.row_offsets(p, targets, logp_guess, sums))
    assert sums.n_rescue.item() == 0
    return sums.offsets


def exact(p: Projection, targets: Tensor, logp_guess: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """k, y, and what an fp32 sum of so many products may be off by."""
    products = p.hidden.double() * p.weight.double()[targets]
    y = products.sum(1) + (0 if p.bias is None else p.bias.double()[targets])
    k = (y * p.row_scale().double() - (0 if logp_guess is None else logp_guess.double())) * LOG2E
    return k, y, 2**-23 * (products.abs().sum(1) + y.abs() + 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (7, 8), (9, 70), (64, 300), (3, 1040), (2, 4099)])
def test_offsets(n: int, dim: int, dtype: torch.dtype, bias: bool, run: Run) -> None:
    p, targets = problem(n, dim, dtype, bias)
    for logp_guess in (None, -5 * torch.rand(n)):
        k, y = offsets_of(p, targets, logp_guess, run).double()
        right, right_y, error = exact(p, targets, logp_guess)
        assert ((y - right_y).abs() <= error).all()
        assert ((k - right).abs() <= 2 * error + 1e-6 * right.abs()).all()


def test_a_hint_that_is_not_finite_is_none(run: Run) -> None:
    p, targets = problem(4, 40, torch.bfloat16)
    logp_guess = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    assert torch.equal(offsets_of(p, targets, logp_guess, run), offsets_of(p, targets, None, run))


def test_a_target_that_is_no_token_makes_its_row_nan(run: Run) -> None:
    p, targets = problem(5, 40, torch.bfloat16)
    wrong = targets.clone()
    wrong[:4] = torch.tensor([V, -1, -2, 2**40])
    offsets = offsets_of(p, wrong, None, run)
    assert offsets[:, :4].isnan().all()
    assert torch.equal(offsets[:, 4], offsets_of(p, targets, None, run)[:, 4])


def test_a_target_that_the_bias_removes_is_to_be_redone(run: Run) -> None:
    p, targets = problem(5, 40, torch.bfloat16, bias=True)
    assert p.bias is not None
    p.bias[targets[2]] = -math.inf
    targets[3] = (targets[2] + 1) % V
    k, y = offsets_of(p, targets, torch.full((5,), -1.0), run)
    assert k[2] == math.inf
    assert y[2] == torch.tensor(-1e20)
    assert k[3].isfinite()


def test_offsets_move_by_what_the_dtype_of_e_asks_for(run: Run) -> None:
    """Row 1 has no logp_guess."""
    p, targets = problem(2, 40, torch.float16)
    logp_guess = torch.tensor([-3.0, math.nan])
    plain = offsets_of(p, targets, logp_guess, run)
    sums = ScaledExpSums(torch.full((2, 2), math.nan), torch.empty(1, 1, 1), 256, torch.empty(1), torch.zeros(1).int())
    launch = rows.row_offsets(p, targets, logp_guess, sums)
    launch.arguments.with_guess, launch.arguments.without_guess = 8.0, 1.0
    run(launch)
    torch.testing.assert_close(sums.offsets[0], plain[0] - torch.tensor([8.0, 1.0]), rtol=1e-6, atol=0)
    assert torch.equal(sums.offsets[1], plain[1])
