"""Weights from the first-order entropy change, against their papers' equations typed out."""

from __future__ import annotations

import math

import pytest
import torch
from token_steps import Step, clipped, compare, group_normalised, make_step, of_policy, scalars

from eapo_kernels import get_method


def _parts(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """S_y = p_y (log p_y + H) and B = sum_v p_v^2 (log p_v + H), from the dense old distribution."""
    p, log_p, h = step.old["p"], step.old["log_p"], step.old["entropy"]
    every = p * (log_p + h[:, None])
    return every.gather(1, step.batch.targets[:, None])[:, 0], (p * every).sum(1)


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


def test_clip_b() -> None:
    """arXiv 2602.03392, released: A < 0 and S - mean S < -mu std S (population) leave the mask, and so the token mean."""
    step, method = make_step(), get_method("clip_b", mu=0.4)
    a, ok, (own, _) = group_normalised(step)[step.ids], step.valid, _parts(step)
    dropped = (a < 0) & (own - own[ok].mean() < -0.4 * own[ok].std(unbiased=False))
    assert 0 < int((dropped & ok).sum()) < int(((a < 0) & ok).sum())
    compare(step, method, of_policy(step, a, keep=~dropped))


@pytest.mark.parametrize("max_share", [0.02, 1.0])
def test_clip_v(max_share: float) -> None:
    """arXiv 2602.03392, released: A < 0 and N - S > mu std(N - S), the largest first, at most a share of the tokens, leave
    the mask."""
    step, method = make_step(3), get_method("clip_v", mu=0.4, max_share=max_share)
    a, ok, (own, expected) = group_normalised(step)[step.ids], step.valid, _parts(step)
    x = expected - own
    candidates = [t for t in range(len(x)) if ok[t] and a[t] < 0 and x[t] > 0.4 * x[ok].std(unbiased=False)]
    candidates.sort(key=lambda t: -float(x[t]))
    chosen = candidates[: max(1, int(max_share * int(ok.sum())))]
    assert len(chosen) == (1 if max_share < 0.1 else len(candidates))
    assert len(candidates) > 2
    keep = torch.ones_like(ok)
    keep[chosen] = False
    compare(step, method, of_policy(step, a, keep=keep))


@pytest.mark.parametrize("trend", [-0.3, 0.02])
def test_papo_like(trend: float) -> None:
    """Our reading of arXiv 2605.11775: polarity P = A (B - S); the branch that the entropy's trend calls for counts more."""
    step, method = make_step(2), get_method("papo_like", gain=0.4, width=0.1)
    a, (own, expected) = group_normalised(step)[step.ids], _parts(step)
    polarity = a * (expected - own)
    strength = 0.4 * max(-1.0, min(1.0, trend / 0.1))
    w = torch.where(polarity > 0, 1 - strength, 1 + strength)
    loss = of_policy(step, w * a, high=0.28)
    weighted = compare(step, method, loss, state=scalars(trend=trend))
    grows = (step.valid & (polarity > 0) & (a != 0)).nonzero()[0, 0]
    assert bool((weighted.advantages[grows].abs() > a[grows].abs()) == (trend < 0))
