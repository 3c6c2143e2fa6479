"""Weights from a token's probability, against the released code and the papers' equations typed out."""

from __future__ import annotations

import pytest
import torch
from token_steps import SIZES, Step, compare, group_normalised, irregular, make_step, of_policy, scalars

from eapo_kernels import get_method, make_controller, observed_entropy, weight_tokens


def _a3po(step: Step, share: float, positive: float, negative: float) -> torch.Tensor:
    """[N] float64: the released loop over responses. Reward 1: the least probable tokens, reward 0: the most probable ones."""
    a = group_normalised(step)[step.ids].clone()
    for i in range(len(SIZES)):
        own = [t for t in range(len(step.ids)) if step.valid[t] and step.ids[t] == i]
        right = float(step.batch.rewards[i]) == 1
        own.sort(key=lambda t: float(step.old["logp"][t]), reverse=not right)
        for t in own[: max(1, int(share * len(own)))] if own else ():
            a[t] *= positive if right else negative
    return a


@pytest.mark.parametrize(("share", "positive", "negative"), [(0.2, 2.0, 5.0), (0.35, 0.5, 3.0), (0.0, 4.0, 0.0)])
def test_a3po(share: float, positive: float, negative: float) -> None:
    """arXiv 2512.21625, released: max(1, int(share * length)) tokens of each response, scaled by the polarity's factor."""
    step = irregular(make_step(2, binary=True))
    method = get_method("a3po", share=share, positive_scale=positive, negative_scale=negative)
    compare(step, method, of_policy(step, _a3po(step, share, positive, negative), mean="responses"))


@pytest.mark.parametrize(("progress", "left"), [(0.0, 1.0), (0.3, 0.5), (0.8, 0.0)])
def test_a3po_fades(progress: float, left: float) -> None:
    """Our schedule: both factors fall linearly to 1. Without ``gone_at`` they stay."""
    step = irregular(make_step(3, binary=True))
    for gone_at, share_left in ((0.6, left), (None, 1.0)):
        weighted = weight_tokens(get_method("a3po", gone_at=gone_at), step.batch, step.stats, progress=progress)
        expected = torch.where(step.valid, _a3po(step, 0.2, 1 + share_left, 1 + share_left), 0.0)
        torch.testing.assert_close(weighted.advantages, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["log_prob", "centred"])
@pytest.mark.parametrize("zeta", [0.05, 0.7, -0.4])
def test_repo_r(zeta: float, form: str) -> None:
    """arXiv 2603.11682, REPO-R: A > 0 gets max(A (1 - zeta log p), 0), A < 0 gets min(A (1 + zeta log p), 0)."""
    step, method = irregular(make_step(1)), get_method("repo_r", form=form)
    own = step.old["logp"] + (step.old["entropy"] if form == "centred" else 0)
    a = group_normalised(step)[step.ids]
    a = torch.where(a > 0, (a * (1 - zeta * own)).clamp_min(0), (a * (1 + zeta * own)).clamp_max(0))
    assert bool((a[step.valid] == 0).any()) == (abs(zeta) > 0.1)
    compare(step, method, of_policy(step, a), state=scalars(zeta=zeta))


def test_repo_r_follows_its_controller() -> None:
    """The first step sets the target; at half of its entropy zeta has doubled, and the weights are those of the new zeta."""
    step, method = make_step(), get_method("repo_r", zeta=0.02)
    controller = make_controller(method)
    total, count = observed_entropy(method, step.batch, step.stats)
    controller.update(total, count)
    assert controller.values()["target"] == total / count
    assert controller.update(total / 2, count) == 0.04
    weighted = weight_tokens(method, step.batch, step.stats, state=controller.values())
    a, logp = group_normalised(step)[step.ids], step.old["logp"]
    expected = torch.where(step.valid, a * (1 - 0.04 * a.sign() * logp).clamp_min(0), 0.0)
    torch.testing.assert_close(weighted.advantages, expected.float(), rtol=1e-5, atol=1e-6)
