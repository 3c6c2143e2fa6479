"""Clip_B, Clip_V and the polarity weights against their papers' equations typed out."""

from __future__ import annotations

import pytest
import torch
from shaped import Step, compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, weight_tokens


def _parts(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """S_y = p_y (log p_y + H) and B = sum_v p_v^2 (log p_v + H), from the dense old distribution."""
    p, log_p, h = step.old["p"], step.old["log_p"], step.old["entropy"]
    every = p * (log_p + h[:, None])
    return every.gather(1, step.batch.targets[:, None])[:, 0], (p * every).sum(1)


def test_clip_b() -> None:
    """arXiv 2602.03392, released: A < 0 and S - mean S < -mu std S (population): no gradient."""
    step, method = make_step(), get_method("clip_b", mu=0.4)
    a, ok, (own, _) = group_normalised(step)[step.ids], step.valid, _parts(step)
    dropped = (a < 0) & (own - own[ok].mean() < -0.4 * own[ok].std(unbiased=False))
    assert 0 < int((dropped & ok).sum()) < int(((a < 0) & ok).sum())
    compare(step, method, of_policy(step, torch.where(dropped, 0.0, a)))


@pytest.mark.parametrize("max_share", [0.02, 1.0])
def test_clip_v(max_share: float) -> None:
    """arXiv 2602.03392, released: A < 0 and N - S > mu std(N - S), the largest first, at most a share of the tokens."""
    step, method = make_step(3), get_method("clip_v", mu=0.4, max_share=max_share)
    a, ok, (own, expected) = group_normalised(step)[step.ids], step.valid, _parts(step)
    x = expected - own
    candidates = [t for t in range(len(x)) if ok[t] and a[t] < 0 and x[t] > 0.4 * x[ok].std(unbiased=False)]
    candidates.sort(key=lambda t: -float(x[t]))
    chosen = candidates[: max(1, int(max_share * int(ok.sum())))]
    assert len(chosen) == (1 if max_share < 0.1 else len(candidates))
    assert len(candidates) > 2
    a[chosen] = 0
    compare(step, method, of_policy(step, a))


@pytest.mark.parametrize("name", ["clip_b", "clip_v"])
def test_nothing_is_dropped_where_all_tokens_are_alike(name: str) -> None:
    """A standard deviation of zero keeps every token."""
    step = make_step()
    same = step.stats._replace(
        logp=torch.full_like(step.stats.logp, -1.0),
        entropy=torch.full_like(step.stats.logp, 0.7),
        p2=torch.full_like(step.stats.logp, 0.3),
        p2_logp=torch.full_like(step.stats.logp, -0.3),
    )
    shaped = weight_tokens(get_method(name, mu=0.0), step.batch, same)
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize("trend", [-0.3, 0.02, 0.0])
def test_papo_like(trend: float) -> None:
    """Our reading of arXiv 2605.11775: polarity P = A (B - S); the branch that the entropy's trend calls for counts more."""
    step, method = make_step(2), get_method("papo_like", gain=0.4, width=0.1)
    a, (own, expected) = group_normalised(step)[step.ids], _parts(step)
    polarity = a * (expected - own)
    strength = 0.4 * max(-1.0, min(1.0, trend / 0.1))
    w = torch.where(polarity > 0, 1 - strength, 1 + strength)
    loss = of_policy(step, w * a, high=0.28)
    shaped = compare(step, method, loss, state={"trend": torch.tensor(trend, dtype=torch.float64)})
    grows = (step.valid & (polarity > 0) & (a != 0)).nonzero()[0, 0]
    assert bool((shaped.advantages[grows].abs() > a[grows].abs()) == (trend < 0))


def test_what_they_refuse() -> None:
    step = make_step()
    with pytest.raises(EapoError, match="mu: expected a finite number >= 0, got -1"):
        get_method("clip_b", mu=-1)
    with pytest.raises(EapoError, match=r"max_share: expected a finite number in \[0, 1\], got 2"):
        get_method("clip_v", max_share=2)
    with pytest.raises(EapoError, match="width: expected a finite number > 0, got 0"):
        get_method("papo_like", width=0)
    with pytest.raises(EapoError, match="stats, extras: expected second_moments with method 'clip_v', got no second_moments"):
        weight_tokens(get_method("clip_v"), step.batch, step.stats._replace(p2=None))
    with pytest.raises(EapoError, match="state: expected trend of controller 'entropy_trend' for method 'papo_like', got no"):
        weight_tokens(get_method("papo_like"), step.batch, step.stats)
