"""The coefficient of a token (csrc/surrogate.h) against E10 typed again in float64, differentiated by autograd."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import pytest
import torch
from finalize_cases import typed_again
from test_epilogue import pointer
from torch import Tensor

from eapo_kernels.ops.backend import SurrogateTerms

pytestmark = pytest.mark.csrc


class Coefficients(NamedTuple):
    loss: Tensor
    d_logp: Tensor
    ratio: Tensor
    old_kl: Tensor
    clipped: Tensor


def coefficients(
    host: ctypes.CDLL, logp: Tensor, old_logp: Tensor, advantage: Tensor, weight: Tensor,
    low: float = 0.8, high: float = 1.3, dual: float = math.inf,
) -> Coefficients:  # fmt: skip
    out = torch.full((5, len(logp)), math.nan)
    host.coefficients(
        len(logp), pointer(logp), pointer(old_logp), pointer(advantage), pointer(weight),
        *(ctypes.c_float(value) for value in (low, high, dual)), pointer(out),
    )  # fmt: skip
    return Coefficients(*out)


def every_sign(log_ratio: Tensor, old_logp: float = -2.0) -> tuple[Tensor, ...]:
    """(logp, old_logp, advantage, weight) of all pairs of log-ratios with advantages 1.5, -0.7 and 0."""
    log_ratio = log_ratio.repeat(3)
    advantage = torch.tensor([1.5, -0.7, 0.0]).repeat_interleave(len(log_ratio) // 3)
    old = torch.full_like(log_ratio, old_logp)
    weight = 0.1 + torch.rand(len(log_ratio), generator=torch.Generator().manual_seed(0))
    return old + log_ratio, old, advantage, weight


@pytest.mark.parametrize("dual_clip", [None, 1.2, 3.0])
def test_is_the_derivative_of_the_loss(dual_clip: float | None, host: ctypes.CDLL) -> None:
    given = every_sign(torch.linspace(-1.5, 1.5, 301))
    logp, old, advantage, weight = given
    n = len(logp)
    actual = coefficients(host, *given, dual=math.inf if dual_clip is None else dual_clip)
    ones = torch.ones(n)
    terms = SurrogateTerms(torch.arange(n), old, weight, advantage, ones, ones, ones[0], 1.0, 0.2, 0.3, dual_clip)
    sums, gradient = typed_again(logp, torch.zeros(n), terms)
    torch.testing.assert_close(actual.d_logp.double(), gradient, rtol=2e-6, atol=1e-7)
    got = [actual.loss, torch.zeros(n), actual.ratio, actual.clipped, actual.old_kl, torch.zeros(n)]
    torch.testing.assert_close(torch.stack([g.double().sum() for g in got]), sums, rtol=2e-6, atol=1e-5)
    assert actual.clipped.sum() > 200


def test_one_percent_where_the_policy_is_certain(host: ctypes.CDLL) -> None:
    """Log-probs of p = 1 - 1e-5 on both sides, as fp32 has them: the ratio's distance from 1 is theirs."""
    logp, old = torch.tensor([-1.00000500e-5, -2.0e-5]), torch.tensor([-2.0e-5, -1.00000500e-5])
    actual = coefficients(host, logp, old, torch.ones(2), torch.ones(2))
    exact = torch.exp(logp.double() - old.double())
    torch.testing.assert_close(actual.d_logp.double(), -exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(actual.old_kl, torch.full((2,), 5e-11), rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["low", "high"])
def test_at_a_bound_the_free_branch_counts(side: str, host: ctypes.CDLL) -> None:
    """A ratio that is the bound itself, to the bit; one number beyond it the side that clips does."""
    given = every_sign(torch.tensor([-0.25 if side == "low" else 0.25]))
    ratio = coefficients(host, *given).ratio[0]
    assert (ratio < 1) == (side == "low")
    bound = {side: float(ratio)}
    tie = coefficients(host, *given, **bound)
    assert (tie.clipped == 0).all()
    assert torch.equal(tie.d_logp, -given[3] * ratio * given[2])
    inward = {side: float(torch.nextafter(ratio, torch.ones(())))}
    past = coefficients(host, *given, **inward)
    assert past.clipped.tolist() == ([0, 1, 0] if side == "low" else [1, 0, 0])
    assert torch.equal(past.d_logp == 0, (past.clipped == 1) | (given[2] == 0))


def test_beyond_sixty_nats_it_is_finite_and_flat(host: ctypes.CDLL) -> None:
    given = every_sign(torch.tensor([60.5, 1e3, math.inf, -60.5, -1e3, -math.inf]), old_logp=-70.0)
    actual = coefficients(host, *given, dual=3.0)
    assert all(value.isfinite().all() for value in actual)
    assert (actual.d_logp == 0).all()
    far = torch.tensor(60.0, dtype=torch.float64).exp()
    torch.testing.assert_close(actual.ratio[:3].double(), far.expand(3), rtol=1e-6, atol=0)
    within = coefficients(host, *every_sign(torch.tensor([59.0, -59.0]), old_logp=-70.0), low=0.0, high=math.inf)
    assert (within.d_logp[:4] != 0).all()


def test_an_unknown_old_log_prob_gives_nan_and_no_gradient(host: ctypes.CDLL) -> None:
    """As autograd of a clamped log-ratio has it: the loss says that something is wrong, the weights stay what they are."""
    logp, old, advantage, weight = every_sign(torch.tensor([0.1]))
    for wrong in (
        coefficients(host, logp, old * math.nan, advantage, weight),
        coefficients(host, logp * math.nan, old, advantage, weight),
    ):
        assert wrong.loss.isnan().all()
        assert wrong.ratio.isnan().all()
        assert wrong.old_kl.isnan().all()
        assert (wrong.d_logp == 0).all()
        assert (wrong.clipped == 0).all()
