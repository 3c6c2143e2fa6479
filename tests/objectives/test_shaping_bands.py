"""EPO and SPINE against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from shaped import SIZES, compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, weight_tokens


def _history(value: float) -> dict[str, torch.Tensor]:
    return {"history": torch.tensor(value, dtype=torch.float64)}


@pytest.mark.parametrize(("schedule", "progress", "weight"), [
    ("constant", 0.9, 1.0),
    ("phases", 0.25, 1 - 0.2 * (1 - math.exp(-2 * 0.5))),
    ("phases", 0.75, 0.8 * math.exp(-3 * 0.5)),
])  # fmt: skip
def test_epo(schedule: str, progress: float, weight: float) -> None:
    """arXiv 2509.22576 with a hinge: L = PG - c mean(H - slope (relu(low Hbar - H) + relu(H - high Hbar))).

    The bounds belong to the old policy, so the comparison is at the old policy's side of every hinge: the gradient of the hinge
    where the old entropy stands.
    """
    step, method = make_step(), get_method("epo", coef=0.3, low=0.9, high=1.1, slope=1.5, schedule=schedule)
    history, h, a = 2.0, step.old["entropy"], group_normalised(step)[step.ids]
    probe = h.clone().requires_grad_()
    hinges = torch.relu(0.9 * history - probe) + torch.relu(probe - 1.1 * history)
    (slopes,) = torch.autograd.grad((probe - 1.5 * weight * hinges).sum(), probe)
    assert len(slopes[step.valid].unique()) == 3
    compare(step, method, of_policy(step, a, bonus=0.3 * slopes), state=_history(history), progress=progress)


def test_epo_as_released_is_a_plain_bonus() -> None:
    """The released penalty is piecewise constant in H: its gradient is zero and only the bonus acts."""
    step, method = make_step(1), get_method("epo", coef=0.3, form="released")
    compare(step, method, of_policy(step, group_normalised(step)[step.ids], bonus=0.3), state=_history(0.5))


def _otsu(values: list[float]) -> float:
    """Otsu 1979 on 100 bins, by exhaustive search over the bin edges: the split of largest variance between its two parts."""
    low, high = min(values), max(values)
    bins = [min(99, int((v - low) / (high - low) * 100)) for v in values]
    best, edge = -1.0, low
    for k in range(99):
        left, right = [b + 0.5 for b in bins if b <= k], [b + 0.5 for b in bins if b > k]
        between = len(left) * len(right) * (sum(left) / len(left) - sum(right) / len(right)) ** 2
        if between > best * (1 + 1e-12):
            best, edge = between, low + (k + 1) * (high - low) / 100
    return edge


def test_spine() -> None:
    """arXiv 2511.17938 (second version): forks above Otsu's threshold, band [median - 1.4826 MAD, median], k3 on forks."""
    step, method = make_step(2), get_method("spine", beta_low=0.3, beta_high=0.2, kl_coef=0.4)
    g = torch.Generator().manual_seed(3)
    reference = step.old["logp"] + 0.3 * torch.randn(len(step.ids), generator=g, dtype=torch.float64)
    step = replace(step, batch=replace(step.batch, ref_logp=reference))
    h, a = step.old["entropy"].float().double(), group_normalised(step)[step.ids]
    forks = step.valid & (h > _otsu(h[step.valid].tolist()))
    assert 3 < int(forks.sum()) < int(step.valid.sum()) - 3
    middle = h[forks].quantile(0.5)
    low = middle - 1.4826 * (h[forks] - middle).abs().quantile(0.5)
    bonus = 0.3 * (h < low).double() - 0.2 * (h > middle).double()
    policy = of_policy(step, a, bonus=bonus, keep=forks, mean="responses")
    lengths = torch.zeros(len(SIZES)).index_add_(0, step.ids, forks.float())

    def loss(hidden, weight):
        delta = reference - step.logp(hidden, weight)
        k3 = delta.exp() - 1 - delta
        return policy(hidden, weight) + 0.4 * (k3 / lengths[step.ids])[forks].sum() / (lengths > 0).sum()

    shaped = compare(step, method, loss)
    assert torch.equal(shaped.mask, forks)


def test_spine_first_version() -> None:
    """arXiv 2511.17938 (first version): forks = top 20 % entropy, band = 10 to 50 % quantile of each response's forks."""
    step, method = make_step(3), get_method("spine", fork="top", share=0.4, beta_low=0.3, beta_high=0.2)
    h, a = step.old["entropy"].float().double(), group_normalised(step)[step.ids]
    forks = step.valid & (h >= h[step.valid].quantile(0.6))
    bonus = torch.zeros_like(h)
    for i in range(len(SIZES)):
        own = forks & (step.ids == i)
        if own.any():
            low, high = h[own].quantile(0.1), h[own].quantile(0.5)
            bonus[own] = 0.3 * (h[own] < low).double() - 0.2 * (h[own] > high).double()
    assert (bonus > 0).any()
    assert (bonus < 0).any()
    compare(step, method, of_policy(step, a, bonus=bonus, keep=forks, mean="responses"))


def test_spine_of_all_tokens_without_hinges_is_grpo() -> None:
    """Every token a fork, betas 0."""
    step = make_step()
    shaped = weight_tokens(get_method("spine", fork="top", share=1.0, beta_low=0, beta_high=0), step.batch, step.stats)
    assert torch.equal(shaped.mask, step.valid)
    assert int(shaped.entropy_coef.count_nonzero()) == 0
    torch.testing.assert_close(shaped.advantages, torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0))


def test_spine_finds_no_fork_where_all_entropies_are_equal() -> None:
    step = make_step()
    flat = step.stats._replace(entropy=torch.full_like(step.stats.entropy, 0.4))
    shaped = weight_tokens(get_method("spine"), step.batch, flat)
    assert not shaped.mask.any()
    assert int(shaped.advantages.count_nonzero()) == 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("epo", {"high": 0.5}, "high: expected a finite number >= 0.8, got 0.5"),
        ("epo", {"form": "paper"}, "form: expected one of hinge, released, got 'paper'"),
        ("epo", {"schedule": "linear"}, "schedule: expected one of constant, phases, got 'linear'"),
        ("spine", {"fork": "best"}, "fork: expected one of otsu, top, got 'best'"),
        ("spine", {"share": 0}, r"share: expected a number in \(0, 1\], got 0"),
        ("spine", {"beta_low": -1}, "beta_low: expected a finite number >= 0, got -1"),
    ],
)
def test_bad_numbers(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        get_method(name, **change)
