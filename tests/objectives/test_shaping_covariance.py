"""Clip-Cov, KL-Cov and STEER against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from shaped import clipped, compare, group_normalised, make_step

from eapo_kernels import EapoError, get_method, policy_loss, weight_tokens


def _covariance(step):
    """arXiv 2505.22617: (A_t - mean A)(log p_t - mean log p) over all valid tokens."""
    a, ok = group_normalised(step)[step.ids], step.valid
    logp = step.old["logp"]
    return (a - a[ok].mean()) * (logp - logp[ok].mean())


def test_clip_cov() -> None:
    """arXiv 2505.22617, Clip-Cov: tokens with low < cov < high, drawn uniformly, lose their gradient."""
    step, method = make_step(), get_method("clip_cov", ratio=0.1, low=0.2, high=2.0)
    a, ok = group_normalised(step)[step.ids], step.valid
    cov = _covariance(step)
    candidates = (cov > 0.2) & (cov < 2.0) & ok
    shaped = weight_tokens(method, step.batch, step.stats, seed=3)
    dropped = ok & (shaped.advantages == 0) & (a != 0)
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
    cov = torch.where(ok, _covariance(step), -math.inf)
    chosen = torch.zeros_like(ok)
    chosen[cov.topk(int(0.15 * int(ok.sum()))).indices] = True

    def loss(hidden, weight):
        log_ratio = step.logp(hidden, weight) - step.old["logp"]
        return (-a * log_ratio.exp() + 0.7 * chosen * log_ratio.abs())[ok].sum() / ok.sum()

    compare(step, method, loss)


@pytest.mark.parametrize("form", ["theorem", "released"])
def test_steer(form: str) -> None:
    """arXiv 2510.10150: weight exp(-alpha |Omega| / max |Omega|); the released code divides A by p and floors the maximum."""
    step, method = make_step(2), get_method("steer", form=form)
    a, ok = group_normalised(step)[step.ids], step.valid
    logp, entropy = step.old["logp"], step.old["entropy"]
    p = logp.exp()
    omega = (a * p * (1 - p) * (logp + entropy)).abs()
    if form == "released":
        omega = omega / p
        k = -math.log(0.8) / max(float(omega[ok].max()), 0.02)
        w = (-k * omega).exp().clamp(0.8, 1.0)
    else:
        w = (math.log(0.8) * omega / omega[ok].max()).exp()

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        return -(w * clipped(ratio, a, 0.2, 0.28))[ok].sum() / ok.sum()

    compare(step, method, loss)


def test_steer_without_shaping_is_grpo_with_a_token_mean() -> None:
    """lambda_min = 1 weighs every token 1."""
    step = make_step(3)
    shaped = weight_tokens(get_method("steer", lambda_min=1.0), step.batch, step.stats)
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


def test_a_shaped_method_refuses_an_unshaped_batch() -> None:
    step = make_step()
    with pytest.raises(EapoError, match=r"batch.advantages: expected those of weight_tokens with method 'steer', got None"):
        policy_loss(step.hidden, step.weight, step.batch, method="steer")
    with pytest.raises(EapoError, match=r"lambda_min: expected a finite number in \[0, 1\], got 2"):
        get_method("steer", lambda_min=2)
    with pytest.raises(EapoError, match="form: expected one of theorem, released, got 'paper'"):
        get_method("steer", form="paper")


def test_kl_cov_on_policy_has_no_gradient_from_rounding() -> None:
    """At the old policy |log rho| has no slope, whatever the last digit of the log-prob."""
    step, method = make_step(1), get_method("kl_cov", ratio=0.5, beta=5.0)
    for noise in (1e-7, -1e-6):
        with torch.no_grad():
            old = step.logp(step.hidden, step.weight).float() + noise
        shaped = replace(weight_tokens(method, step.batch, step.stats), old_logp=old)
        plain = replace(shaped, ratio_penalty=None)
        gradients = []
        for batch in (shaped, plain):
            weight = step.weight.clone().requires_grad_()
            policy_loss(step.hidden, weight, batch, method=method).loss.backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(*gradients)
