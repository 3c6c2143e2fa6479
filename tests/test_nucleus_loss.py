"""``entropy_top_p``: the bonus is on the nucleus entropy, the logged entropy stays the full distribution's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eapo_kernels import METHODS, EAPOConfig, EapoError, LossOutput, TokenBatch, nucleus_entropy, policy_loss, reference
from eapo_kernels.testing import Inputs, make_inputs

N, TOP_P = 60, 0.8


@pytest.fixture
def inputs(device: str) -> Inputs:
    return make_inputs(N, 16, 301, device=device).to(torch.float64)


@pytest.fixture
def batch(inputs: Inputs) -> TokenBatch:
    """Coefficients of both signs and a masked token in five."""
    place = torch.arange(N, device=inputs.hidden.device)
    coefficients = 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(1)).to(place.device)
    ids, rewards = place * 6 // N, torch.tensor([0.0, 1.0, 0.3, 0.2, 0.9, 0.4], device=place.device)
    return TokenBatch(
        inputs.targets, ids, rewards, torch.arange(6, device=place.device) // 3, mask=place % 5 != 0, entropy_coef=coefficients
    )


def loss(
    inputs: Inputs, batch: TokenBatch, schedule: str = "auto", **changes: float | None
) -> tuple[LossOutput, tuple[Tensor, ...]]:
    method = replace(METHODS["grpo"], config=EAPOConfig(**{"entropy_coef": 0.05, "entropy_top_p": TOP_P, **changes}))
    leaves = inputs.leaves()
    out = policy_loss(*leaves, batch, method=method, schedule=schedule)
    return out, torch.autograd.grad(out.loss, leaves)


def test_loss_and_gradient(inputs: Inputs, batch: TokenBatch) -> None:
    """loss(bonus) - loss(no bonus) = -mean over valid tokens of (coef + coef_t) Hk_t, in value and gradient."""
    with_bonus, gradients = loss(inputs, batch)
    without, plain = loss(inputs, replace(batch, entropy_coef=None), entropy_coef=0.0)
    leaves = inputs.leaves()
    values = nucleus_entropy(*leaves, top_p=TOP_P)
    assert batch.mask is not None
    assert batch.entropy_coef is not None
    bonus = -((0.05 + batch.entropy_coef) * values)[batch.mask].mean()
    torch.testing.assert_close(with_bonus.loss - without.loss, bonus.detach(), check_dtype=False, rtol=1e-5, atol=1e-7)
    for total, base, part in zip(gradients, plain, torch.autograd.grad(bonus, leaves), strict=True):
        torch.testing.assert_close(total - base, part, rtol=1e-5, atol=1e-7 * float(part.abs().max()) + 1e-9)


def test_the_logged_entropy_is_the_full_distributions(inputs: Inputs, batch: TokenBatch) -> None:
    out, _ = loss(inputs, batch)
    full = reference.token_stats(inputs.hidden, inputs.weight, inputs.targets).entropy
    assert full is not None
    assert out.metrics["eapo/entropy"].item() == pytest.approx(full[batch.mask].mean().item(), rel=1e-5)


def test_one_pass_is_refused_by_name_and_not_chosen(inputs: Inputs, batch: TokenBatch) -> None:
    with pytest.raises(EapoError, match=r"schedule: expected 'autograd' for entropy_top_p=0\.8, got 'one_pass'"):
        loss(inputs, batch, "one_pass")
    assert torch.equal(loss(inputs, batch)[0].loss, loss(inputs, batch, "autograd")[0].loss)


def test_without_a_bonus_it_costs_nothing(inputs: Inputs, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("called")

    monkeypatch.setattr("eapo_kernels.loss.project_nucleus_entropy", never)
    quiet = replace(batch, entropy_coef=None)
    a, b = loss(inputs, quiet, entropy_coef=0.0)[0], loss(inputs, quiet, "autograd", entropy_coef=0.0, entropy_top_p=None)[0]
    assert torch.equal(a.loss, b.loss)
