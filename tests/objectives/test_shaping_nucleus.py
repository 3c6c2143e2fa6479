"""SIREN against its paper's equation typed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from shaped import SIZES, Step, clipped, compare, make_step

from eapo_kernels import EapoError, TokenStats, get_method, make_controller, observed_entropy, weight_tokens

TOP_P, BETA, LENGTH = 0.8, 0.7, 40


def _nucleus_entropy(logits: torch.Tensor) -> torch.Tensor:
    """[N] entropy of the renormalised smallest set of tokens with mass >= 0.8; the set is constant."""
    out = []
    for row in torch.softmax(logits, -1):
        ordered, order = row.detach().sort(descending=True)
        size = int((ordered.cumsum(0) < TOP_P).sum()) + 1
        q = row[order[:size]] / row[order[:size]].sum()
        out.append(-(q * q.log()).sum())
    return torch.stack(out)


def _on_policy(step: Step) -> Step:
    """The step with the present weights as the old policy too."""
    log_p = torch.log_softmax(step.hidden @ step.weight.T, -1)
    logp = log_p.gather(1, step.batch.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    stats = TokenStats(logp, entropy, torch.zeros_like(logp))
    return replace(step, batch=replace(step.batch, old_logp=logp), stats=stats, old={"logp": logp, "log_p": log_p})


def _mean_at_peaks(step: Step, values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Mean over responses of the mean of ``values`` over the tokens where ``at`` exceeds the response's 0.8-quantile."""
    means = []
    for i in range(len(SIZES)):
        own = step.valid & (step.ids == i)
        peak = own & (at > at[own].quantile(0.8))
        means.append(values[peak].mean() if peak.any() else torch.zeros((), dtype=torch.float64))
    return torch.stack(means).mean()


def _policy_term(step: Step) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    r, a = step.batch.rewards.double(), torch.zeros(len(SIZES), dtype=torch.float64)
    for group in range(2):
        own = step.batch.group_ids == group
        a[own] = r[own] - r[own].mean()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        return -clipped(ratio, a[step.ids], 0.28, 0.28)[step.valid].sum() / (len(SIZES) * LENGTH)

    return loss


@pytest.mark.parametrize("anchor", [0.5, 3.0])
def test_siren(anchor: float) -> None:
    """arXiv 2509.25133: PG + beta (Hbar - Hanchor)^2, Hbar over the top fifth of each response, nucleus of mass 0.8.

    On-policy, where the gradient is that of the square itself; the loss differs from it by a constant, taken out here.
    """
    step, method = _on_policy(make_step()), get_method("siren", beta=BETA, fixed_length=LENGTH)
    old = _nucleus_entropy(step.old["log_p"])
    start = _mean_at_peaks(step, old, old)
    policy = _policy_term(step)
    offset = 2 * BETA * (start - anchor) * start - BETA * (start - anchor) ** 2

    def loss(hidden, weight):
        mean = _mean_at_peaks(step, _nucleus_entropy(hidden @ weight.T), old)
        return policy(hidden, weight) + BETA * (mean - anchor) ** 2 + offset

    state = {"anchor": torch.tensor(anchor, dtype=torch.float64)}
    shaped = compare(step, method, loss, state=state, extras={"nucleus_entropy": old})
    assert int((shaped.entropy_coef != 0).sum()) < 0.4 * int(step.valid.sum())


def test_siren_after_an_update() -> None:
    """Off-policy the pull and the peaks stay the old policy's: PG + 2 beta (Hbar_old - Hanchor) Hbar."""
    step, method = make_step(1), get_method("siren", beta=BETA, fixed_length=LENGTH)
    old = _nucleus_entropy(step.old["log_p"])
    pull = 2 * BETA * (_mean_at_peaks(step, old, old) - 0.4)
    policy = _policy_term(step)
    compare(
        step,
        method,
        lambda hidden, weight: policy(hidden, weight) + pull * _mean_at_peaks(step, _nucleus_entropy(hidden @ weight.T), old),
        state={"anchor": torch.tensor(0.4, dtype=torch.float64)},
        extras={"nucleus_entropy": old},
    )


def test_the_first_step_sets_the_anchor_and_pulls_nowhere() -> None:
    step, method = make_step(), get_method("siren", fixed_length=LENGTH)
    extras = {"nucleus_entropy": _nucleus_entropy(step.old["log_p"])}
    total, count = observed_entropy(method, step.batch, step.stats, extras=extras)
    assert int(count) == len(SIZES)
    values = extras["nucleus_entropy"]
    torch.testing.assert_close(total / count, _mean_at_peaks(step, values, values))
    controller = make_controller(method)
    controller.update(total, count)
    shaped = weight_tokens(method, step.batch, step.stats, state=controller.values(), extras=extras)
    torch.testing.assert_close(shaped.entropy_coef, torch.zeros(len(step.ids)), atol=1e-9, rtol=0)
    controller.update(2 * total, count)
    torch.testing.assert_close(controller.values()["anchor"], total / count)


def test_what_it_refuses() -> None:
    step, state = make_step(), {"anchor": torch.tensor(1.0)}
    with pytest.raises(EapoError, match="stats, extras: expected nucleus_entropy with method 'siren', got no nucleus_entropy"):
        weight_tokens(get_method("siren", fixed_length=9), step.batch, step.stats, state=state)
    with pytest.raises(EapoError, match="state: expected anchor of controller 'anchor' for method 'siren', got no anchor"):
        weight_tokens(get_method("siren", fixed_length=9), step.batch, step.stats)
    with pytest.raises(EapoError, match=r"peak_quantile: expected a finite number in \[0, 1\], got 80"):
        get_method("siren", peak_quantile=80)
    with pytest.raises(EapoError, match="anchor: expected a finite number >= 0, got -1"):
        get_method("siren", anchor=-1)
