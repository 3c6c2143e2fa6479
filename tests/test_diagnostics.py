"""Predictions of the entropy's change against the change itself, in float64 on tabular logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from token_steps import make_step
from torch import Tensor

from eapo_kernels import (
    METHODS,
    EapoError,
    EntropyRatio,
    TokenBatch,
    TokenStats,
    diagnostics,
    get_method,
    policy_loss,
    weight_tokens,
)

N, V = 40, 31


def entropy_of(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def stats_of(z: Tensor, targets: Tensor) -> TokenStats:
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return TokenStats(chosen, entropy_of(z), z.logsumexp(-1), p.square().sum(-1), (p.square() * log_p).sum(-1))


@pytest.fixture
def z() -> Tensor:
    """[N, V] logits from flat to peaked."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, V, generator=g, dtype=torch.float64) * torch.linspace(0.1, 6, N, dtype=torch.float64)[:, None]


@pytest.fixture
def targets(z: Tensor) -> Tensor:
    return torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def score(z: Tensor, targets: Tensor) -> Tensor:
    """[N, V] grad_z log p_y = e_y - p."""
    return torch.nn.functional.one_hot(targets, V) - z.softmax(-1)


def test_entropy_change_is_the_derivative_along_the_step(z: Tensor, targets: Tensor, weights: Tensor) -> None:
    """E7 by central differences: H(z + eta w (e_y - p)) - H(z - eta w (e_y - p)) over 2 eta."""
    step, eta = weights[:, None] * score(z, targets), 1e-5
    measured = (entropy_of(z + eta * step) - entropy_of(z - eta * step)) / (2 * eta)
    predicted = diagnostics.entropy_change(stats_of(z, targets), weights)
    torch.testing.assert_close(predicted, measured, rtol=1e-6, atol=1e-9)


def test_score_norm(z: Tensor, targets: Tensor) -> None:
    torch.testing.assert_close(diagnostics.score_norm(stats_of(z, targets)), score(z, targets).square().sum(-1))
    confident = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    tiny = diagnostics.score_norm(stats_of(confident, torch.tensor([0])))
    assert tiny.item() == pytest.approx(6 * torch.tensor(-80.0, dtype=torch.float64).exp().item(), rel=1e-6)


def test_polarity_has_mean_zero_under_the_policy(z: Tensor) -> None:
    every = torch.stack([diagnostics.polarity(stats_of(z, torch.full((N,), v))) for v in range(V)], 1)
    torch.testing.assert_close((z.softmax(-1) * every).sum(1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_diagnose_by_hand(z: Tensor, targets: Tensor, weights: Tensor) -> None:
    weights = weights.clone()
    weights[3] = 0
    valid = torch.arange(N) % 7 != 0
    stats = stats_of(z, targets)
    found = diagnostics.diagnose(stats, weights, valid)
    d = diagnostics.polarity(stats)
    gradient = weights[:, None] * score(z, targets)
    positive, negative = valid & (weights > 0), valid & (weights < 0)
    expected = {
        "predicted_entropy_change": -(weights * d)[valid].sum(),
        "contracting_positive": (d[positive] > 0).double().mean(),
        "expanding_positive": (d[positive] < 0).double().mean(),
        "contracting_negative": (d[negative] > 0).double().mean(),
        "expanding_negative": (d[negative] < 0).double().mean(),
        "positive_gradient_norm": gradient[positive].norm(),
        "negative_gradient_norm": gradient[negative].norm(),
        "positive_gradient_share": gradient[positive].square().sum() / gradient[valid].square().sum(),
    }
    assert found.keys() == {f"dynamics/{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"dynamics/{name}"], value.float())


def test_what_does_not_count_may_be_anything(z: Tensor, targets: Tensor, weights: Tensor) -> None:
    valid = torch.arange(N) % 2 == 0
    stats = stats_of(z, targets)
    clean = diagnostics.diagnose(stats, weights, valid)
    spoilt = TokenStats(*(torch.where(valid, t, torch.nan) for t in stats if t is not None))
    found = diagnostics.diagnose(spoilt, torch.where(valid, weights, torch.nan), valid)
    assert found == clean
    none = diagnostics.diagnose(stats, weights, torch.zeros_like(valid))
    assert all(value.item() == 0 for value in none.values())


def make_batch(targets: Tensor, stats: TokenStats) -> TokenBatch:
    ids = torch.arange(N) // 5
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    return TokenBatch(targets, ids, rewards, torch.arange(8) // 4, old_logp=stats.logp.float(), mask=torch.arange(N) % 6 != 1)


@pytest.mark.parametrize(
    "name", ["grpo", "eapo", "gspo", "dapo", "w_reinforce", "psr", "steer", "kl_cov", "aepo_agentic", "epo"]
)
def test_token_weights_are_the_losses_gradient(name: str, z: Tensor, targets: Tensor) -> None:
    """Through a head that is the identity, dL/dz = -w (e_y - p) - c dH/dz with the weights that were found."""
    method, stats = METHODS[name], stats_of(z, targets)
    batch = make_batch(targets, stats)
    state = {"history": torch.tensor(1.0)}
    weighted = weight_tokens(method, batch, TokenStats(*(None if t is None else t.float() for t in stats)), state=state)
    given = 0.7 if method.positive_weight is None else None
    for shift in (0.0, 0.4):  # at the old policy and away from it
        if name == "kl_cov" and not shift:
            continue  # there the sign of log(pi / pi_old) is that of a rounding
        hidden = (
            z + shift * torch.randn(N, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        ).requires_grad_()
        now = stats_of(hidden.detach(), targets)
        eye = torch.eye(V, dtype=torch.float64)
        loss = policy_loss(hidden, eye, weighted, method=method, positive_weight=given, schedule="autograd").loss
        (found,) = torch.autograd.grad(loss, hidden)
        w = diagnostics.token_weights(method, weighted, now.logp if shift else None, positive_weight=given)
        p = hidden.detach().softmax(-1)
        d_entropy = -p * (p.log() + now.entropy[:, None])
        expected = -w.logp[:, None] * score(hidden.detach(), targets) - w.entropy[:, None] * d_entropy
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-7)


def test_the_predicted_change_of_a_step_on_the_loss(z: Tensor, targets: Tensor) -> None:
    """One small step of gradient descent on the whole loss in logit space changes the entropies' sum as predicted."""
    stats, method = stats_of(z, targets), get_method("w_reinforce")
    batch = make_batch(targets, stats)
    found = diagnostics.diagnose_batch(method, batch, TokenStats(*(None if t is None else t.float() for t in stats)))
    hidden, eta = z.clone().requires_grad_(), 1e-4
    policy_loss(hidden, torch.eye(V, dtype=torch.float64), batch, method=method, schedule="autograd").loss.backward()
    assert hidden.grad is not None
    change = (entropy_of(z - eta * hidden.grad) - entropy_of(z + eta * hidden.grad)).sum() / (2 * eta)
    assert found["dynamics/predicted_entropy_change"].item() == pytest.approx(change.item(), rel=1e-3)


def test_missing_statistics_are_named(z: Tensor, targets: Tensor, weights: Tensor) -> None:
    stats = stats_of(z, targets)
    with pytest.raises(EapoError, match=r"stats\.p2, stats.p2_logp: expected second_moments=True, got None"):
        diagnostics.entropy_change(stats._replace(p2=None), weights)
    with pytest.raises(EapoError, match=r"weights: expected .* \[40\] cpu, got float64 \[39\] cpu"):
        diagnostics.entropy_change(stats, weights[1:])
    batch = replace(make_batch(targets, stats), old_logp=None)
    with pytest.raises(EapoError, match=r"logp: expected \[N\], or a batch with old_logp, got None"):
        diagnostics.token_weights("grpo", batch)
    with pytest.raises(EapoError, match=r"positive_weight: expected a number, .* for method 'eapo', got None"):
        diagnostics.token_weights("eapo", make_batch(targets, stats))


def test_the_weight_of_the_positives_is_taken_as_the_loss_takes_it() -> None:
    step = make_step()
    ratio = EntropyRatio()
    ratio.update(10.0, 10)
    ratio.update(5.0, 10)
    ours = diagnostics.token_weights("eapo", step.batch, positive_weight=ratio)
    plain = diagnostics.token_weights("eapo", step.batch, positive_weight=0.5)
    torch.testing.assert_close(ours.logp, plain.logp)
    with pytest.raises(EapoError, match="positive_weight: expected None for method 'grpo', whose weight is 1, got 2"):
        diagnostics.token_weights("grpo", step.batch, positive_weight=2.0)
