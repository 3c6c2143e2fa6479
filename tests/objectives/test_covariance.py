"""Weights from the covariance of advantage and log-prob, against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from token_steps import SIZES, clipped, compare, group_normalised, make_step, of_policy

from eapo_kernels import get_method, policy_loss, weight_tokens


def _covariance(a: torch.Tensor, logp: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """arXiv 2505.22617: (A_t - mean A)(log p_t - mean log p)."""
    return (a - a[among].mean()) * (logp - logp[among].mean())


def test_clip_cov() -> None:
    """arXiv 2505.22617, Clip-Cov: tokens with low < cov < high, drawn uniformly, lose their gradient."""
    step, method = make_step(), get_method("clip_cov", ratio=0.1, low=0.2, high=2.0)
    a, ok = group_normalised(step)[step.ids], step.valid
    cov = _covariance(a, step.old["logp"], ok)
    candidates = (cov > 0.2) & (cov < 2.0) & ok
    weighted = weight_tokens(method, step.batch, step.stats, seed=3)
    dropped = ok & (weighted.advantages == 0) & (a != 0)
    assert int(dropped.sum()) == min(int(0.1 * int(ok.sum())), int(candidates.sum())) > 1
    assert bool((candidates | ~dropped).all())
    assert not torch.equal(dropped, ok & (weight_tokens(method, step.batch, step.stats, seed=4).advantages == 0) & (a != 0))

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        return -(clipped(ratio, a * ~dropped, 1.0, 1.0))[ok].sum() / ok.sum()

    compare(step, method, loss, seed=3)


def test_kl_cov() -> None:
    """arXiv 2505.22617, KL-Cov: -A rho, plus beta |log rho| on the top share by covariance."""
    step, method = make_step(1), get_method("kl_cov", ratio=0.15, beta=0.7)
    a, ok = group_normalised(step)[step.ids], step.valid
    cov = torch.where(ok, _covariance(a, step.old["logp"], ok), -math.inf)
    chosen = torch.zeros_like(ok)
    chosen[cov.topk(int(0.15 * int(ok.sum()))).indices] = True

    def loss(hidden, weight):
        log_ratio = step.logp(hidden, weight) - step.old["logp"]
        return (-a * log_ratio.exp() + 0.7 * chosen * log_ratio.abs())[ok].sum() / ok.sum()

    compare(step, method, loss)


def test_kl_cov_on_policy_has_no_gradient_from_rounding() -> None:
    """At the old policy |log rho| has no gradient, whatever the rounding of the log-prob."""
    step, method = make_step(1), get_method("kl_cov", ratio=0.5, beta=5.0)
    for noise in (1e-7, -1e-6):
        with torch.no_grad():
            old = step.logp(step.hidden, step.weight).float() + noise
        weighted = replace(weight_tokens(method, step.batch, step.stats), old_logp=old)
        plain = replace(weighted, ratio_penalty=None)
        gradients = []
        for batch in (weighted, plain):
            weight = step.weight.clone().requires_grad_()
            policy_loss(step.hidden, weight, batch, method=method).loss.backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(*gradients)


def test_tea_rl() -> None:
    """arXiv 2508.03178: c_t = clamp(10 softmax_t(cov_t), 0, 5), constant; L = PG - mean(c_t H_t)."""
    step, method = make_step(1), get_method("tea_rl", scale=2.0, most=0.5)
    a, ok = group_normalised(step)[step.ids], step.valid
    cov, bonus = _covariance(a, step.old["logp"], ok), torch.zeros(len(step.ids), dtype=torch.float64)
    for i in range(len(SIZES)):
        own = ok & (step.ids == i)
        bonus[own] = (2.0 * torch.softmax(cov[own], 0)).clamp(0, 0.5)
    assert (bonus == 0.5).any()
    compare(step, method, of_policy(step, a, bonus=bonus))


def _with_replay(seed: int):
    """Responses 2, 5 and 7 come from the buffer; every response brings its advantage."""
    step = make_step(seed)
    replayed = (step.ids == 2) | (step.ids == 5) | (step.ids == 7)
    given = group_normalised(step).float()
    given[5] = 1.4
    given[7] = -0.6  # not imitated
    return replace(step, batch=replace(step.batch, advantages=given)), replayed, given.double()


@pytest.mark.parametrize(("progress", "ramp"), [(0.1, 0.5 * (1 - math.cos(0.25 * math.pi))), (0.9, 1.0)])
def test_spear(progress: float, ramp: float) -> None:
    """arXiv 2509.22601: L_GRPO + coef (1 - cos(pi u / U)) / 2 L_replay, Clip-Cov in both (its release), in the replayed
    positive advantages only."""
    step, replayed, given = _with_replay(0)
    method = get_method(
        "spear", full_at=0.4, coef=0.8, ratio=0.1, low=0.1, high=60.0, fresh_ratio=0.2, fresh_low=0.05, fresh_high=9.0
    )
    ok, a = step.valid, given[step.ids]
    old, fresh = ok & replayed, ok & ~replayed
    drawn = torch.rand(len(a), generator=torch.Generator().manual_seed(5))
    dropped = torch.zeros_like(old)
    for part, share, low, high in ((old, 0.1, 0.1, 60.0), (fresh, 0.2, 0.05, 9.0)):
        cov = _covariance(a, step.old["logp"], part)
        candidates = part & (cov > low) & (cov < high)
        chosen = sorted(candidates.nonzero()[:, 0].tolist(), key=lambda t: -float(drawn[t]))[: int(share * int(part.sum()))]
        assert 0 < len(chosen) < int(candidates.sum())
        dropped[chosen] = True
        assert (dropped & part & (a > 0)).any()
    kept = a * ~dropped
    imitated = kept.clamp_min(0)

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        on_policy = -clipped(ratio, kept)[fresh].mean()
        replay = -clipped(ratio, imitated)[old].mean()
        return on_policy + 0.8 * ramp * replay

    compare(step, method, loss, extras={"replayed": replayed}, progress=progress, seed=5)
