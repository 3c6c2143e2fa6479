"""Weights and bonuses from entropies, against their papers' equations typed out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from token_steps import (
    SIZES,
    Step,
    clipped,
    compare,
    group_normalised,
    irregular,
    make_step,
    of_policy,
    scalars,
)

from eapo_kernels import EapoError, TokenStats, get_method, make_controller, observed_entropy, policy_loss, weight_tokens


def test_aepo_agentic() -> None:
    """arXiv 2510.14545: A (1 + 0.2 z(H)); the upper bound keeps its gradient, (1 + eps) rho / sg(rho) A; dual clip 3."""
    step, method = make_step(), get_method("aepo_agentic", clip_high=0.05)
    a, ok, h = group_normalised(step)[step.ids], step.valid, step.old["entropy"]
    a = a * (1 + 0.2 * (h - h[ok].mean()) / h[ok].std(unbiased=False))

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        upper = 1.05 * ratio / ratio.detach()
        bounded = torch.where(ratio > 1.05, upper, ratio.clamp_min(0.8))
        term = torch.minimum(ratio * a, bounded * a)
        return -torch.where(a < 0, torch.maximum(term, 3.0 * a), term)[ok].sum() / ok.sum()

    compare(step, method, loss)


def _hapo_score(step: Step, pivot: float) -> list[float]:
    """arXiv 2509.16591, eqs. 5 and 6: log H minus its quantile (of the sorted values, the nearest), scaled to [-1, 1]."""
    logs = {t: math.log(float(step.old["entropy"][t])) for t in range(len(step.ids)) if step.valid[t]}
    middle = sorted(logs.values())[round(pivot * (len(logs) - 1))]
    x = {t: log - middle for t, log in logs.items()}
    top, bottom = max(x.values()), min(x.values())
    return [0.0 if t not in x else x[t] / top if x[t] > 0 else -x[t] / bottom for t in range(len(step.ids))]


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("most", [1.5, 5.0])
def test_hapo(form: str, most: float) -> None:
    """arXiv 2509.16591, eqs. 9 to 13, one token at a time; in the released code h <= 0 comes out as |h|, and a group that
    reaches the bound has GRPO's advantages."""
    step = irregular(make_step(2, binary=True))
    method = get_method("hapo", pivot=0.6, most=most, form=form, clip_low=0.1, clip_high=0.15, dual_clip=1.3)
    score, ok = _hapo_score(step, 0.6), [t for t in range(len(step.ids)) if step.valid[t]]
    assert min(score) == -1
    assert max(score) == 1
    score = [abs(h) for h in score] if form == "released" else score
    rewards, group_of = step.batch.rewards.double(), step.batch.group_ids[step.ids]
    a = torch.zeros(len(step.ids), dtype=torch.float64)
    for group in (4, 9):
        own = torch.tensor([t for t in ok if group_of[t] == group])
        r = rewards[step.ids[own]]
        a[own] = (r - r.mean()) / (r.std(unbiased=False) + 1e-6)
        if a[own].abs().max() >= most:
            present = torch.tensor([i for i in range(len(SIZES)) if step.batch.group_ids[i] == group and i != 2])
            a[own] = ((r - rewards[present].mean()) / (rewards[present].std() + 1e-6)).double()
    cases = set()

    def loss(hidden, weight):
        rho = (step.logp(hidden, weight) - step.old["logp"]).exp()
        total = torch.zeros((), dtype=torch.float64)
        for t in ok:
            h, rate = score[t], float(rho[t].detach())
            low, high = (0.1, 0.15 * (1 + h)) if h > 0 else (0.1 * (1 - h), 0.15)
            inside = 1 - low / 2 < rate < 1 + high / 2
            own = a[t] * (1 + h) if inside == (h <= 0) else a[t]
            term = torch.minimum(rho[t] * own, rho[t].clamp(1 - low, 1 + high) * own)
            total = total - (torch.maximum(term, 1.3 * own) if own < 0 else term)
            cases.add((h > 0, inside, bool(a[t] > 0)))
        return total / len(ok)

    compare(step, method, loss)
    assert len([case for case in cases if case[0]]) == 4
    assert form == "released" or len(cases) == 8
    assert set(ok) == set(weight_tokens(method, step.batch, step.stats).advantages.nonzero()[:, 0].tolist())


def test_hapo_with_one_entropy_or_equal_rewards() -> None:
    """No score and no advantage come out of nothing."""
    step, method = make_step(), get_method("hapo")
    flat = step.stats._replace(entropy=torch.full_like(step.stats.entropy, 0.7))
    weighted = weight_tokens(method, replace(step.batch, rewards=torch.full((len(SIZES),), 0.1)), flat)
    assert int(weighted.advantages.count_nonzero()) == int(weighted.entropy_score.count_nonzero()) == 0
    certain = weight_tokens(method, step.batch, step.stats._replace(entropy=torch.zeros_like(flat.entropy)))
    assert int(certain.entropy_score.count_nonzero()) == 0


def test_hapo_needs_the_scores_of_weight_tokens() -> None:
    step, method = make_step(), get_method("hapo")
    batch = replace(step.batch, advantages=torch.ones(len(SIZES)))
    with pytest.raises(EapoError, match=r"batch.entropy_score: expected \[N\] floats with surrogate='hapo', got None"):
        policy_loss(step.hidden, step.weight, batch, method=method)
    with pytest.raises(EapoError, match=r"batch.advantages: expected None with a method that makes its own"):
        weight_tokens(method, batch, step.stats)


@pytest.mark.parametrize(("schedule", "progress", "weight"), [
    ("constant", 0.9, 1.0),
    ("phases", 0.25, 1 - 0.2 * (1 - math.exp(-2 * 0.5))),
    ("phases", 0.75, 0.8 * math.exp(-3 * 0.5)),
])  # fmt: skip
def test_epo(schedule: str, progress: float, weight: float) -> None:
    """arXiv 2509.22576 with a hinge: L = PG - c mean(H - slope (relu(low Hbar - H) + relu(H - high Hbar))).

    Bounds and indicators are the old policy's: the slope of each hinge is that at the old entropy.
    """
    step, method = make_step(), get_method("epo", coef=0.3, low=0.9, high=1.1, slope=1.5, schedule=schedule)
    history, h, a = 2.0, step.old["entropy"], group_normalised(step)[step.ids]
    probe = h.clone().requires_grad_()
    hinges = torch.relu(0.9 * history - probe) + torch.relu(probe - 1.1 * history)
    (slopes,) = torch.autograd.grad((probe - 1.5 * weight * hinges).sum(), probe)
    assert len(slopes[step.valid].unique()) == 3
    compare(step, method, of_policy(step, a, bonus=0.3 * slopes), state=scalars(history=history), progress=progress)


def test_epo_as_released_is_a_plain_bonus() -> None:
    """The released penalty is piecewise constant in H: its gradient is zero and only the bonus acts."""
    step, method = make_step(1), get_method("epo", coef=0.3, form="released")
    compare(step, method, of_policy(step, group_normalised(step)[step.ids], bonus=0.3), state=scalars(history=0.5))


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

    weighted = compare(step, method, loss)
    assert torch.equal(weighted.mask, forks)


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


def test_spine_finds_no_fork_where_all_entropies_are_equal() -> None:
    step = make_step()
    flat = step.stats._replace(entropy=torch.full_like(step.stats.entropy, 0.4))
    weighted = weight_tokens(get_method("spine"), step.batch, flat)
    assert not weighted.mask.any()
    assert int(weighted.advantages.count_nonzero()) == 0


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

    weighted = compare(step, method, loss, state=scalars(anchor=anchor), extras={"nucleus_entropy": old})
    assert int((weighted.entropy_coef != 0).sum()) < 0.4 * int(step.valid.sum())


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
        state=scalars(anchor=0.4),
        extras={"nucleus_entropy": old},
    )


def test_siren_sets_its_anchor_in_the_first_step_and_has_no_bonus_there() -> None:
    step, method = make_step(), get_method("siren", fixed_length=LENGTH)
    extras = {"nucleus_entropy": _nucleus_entropy(step.old["log_p"])}
    total, count = observed_entropy(method, step.batch, step.stats, extras=extras)
    assert int(count) == len(SIZES)
    values = extras["nucleus_entropy"]
    torch.testing.assert_close(total / count, _mean_at_peaks(step, values, values))
    controller = make_controller(method)
    controller.update(total, count)
    weighted = weight_tokens(method, step.batch, step.stats, state=controller.values(), extras=extras)
    torch.testing.assert_close(weighted.entropy_coef, torch.zeros(len(step.ids)), atol=1e-9, rtol=0)
    controller.update(2 * total, count)
    torch.testing.assert_close(controller.values()["anchor"], total / count)


@pytest.mark.parametrize(("alpha", "bound", "used"), [(-0.3, None, -0.3), (1.7, None, 1.7), (1.7, 1.0, 1.0)])
def test_entropic(alpha: float, bound: float | None, used: float) -> None:
    """EntroPIC: (1 + alpha) A for A > 0, (1 - alpha) A for A < 0."""
    step, method = make_step(), get_method("entropic", bound=bound)
    a = group_normalised(step)[step.ids]
    a = torch.where(a > 0, (1 + used) * a, (1 - used) * a)
    compare(step, method, of_policy(step, a), state=scalars(alpha=alpha))


@pytest.mark.parametrize(("schedule", "progress", "done", "where"), [
    ("linear", 0.25, 0.25, "above"),
    ("cosine", 0.25, 0.5 * (1 - math.cos(math.pi / 4)), "below"),
    ("linear", 1.0, 1.0, "inside"),
])  # fmt: skip
def test_entrocraft(schedule: str, progress: float, done: float, where: str) -> None:
    """arXiv 2604.26326: m = [H > high] - [H < low]; a response stays where m A >= 0. The band's bounds move."""
    step = make_step()
    h, a = float(step.old["entropy"][step.valid].mean()), group_normalised(step)[step.ids]
    centre = {"above": h - 0.3, "inside": h, "below": h + 0.3}[where]  # of the band at this progress, 0.2 wide
    first, last = centre + 0.5 * done, centre - 0.5 * (1 - done)
    bounds = {"low_first": first - 0.1, "high_first": first + 0.1, "low_last": last - 0.1, "high_last": last + 0.1}
    method = get_method("entrocraft", schedule=schedule, **bounds)
    m = {"above": 1, "inside": 0, "below": -1}[where]
    keep = m * a >= 0
    weighted = compare(step, method, of_policy(step, a, keep=keep), progress=progress)
    assert int(weighted.mask.sum()) == int((keep & step.valid).sum())


@pytest.mark.parametrize("where", ["above", "inside", "below"])
def test_entrocraft_as_released(where: str) -> None:
    """The authors' code: max(r, 0) above the band, min(r, 0) below it, raw rewards; GRPO inside; nothing leaves the batch."""
    step = make_step(1)
    step = replace(step, batch=replace(step.batch, rewards=step.batch.rewards * 2 - 1))
    h, r = float(step.old["entropy"][step.valid].mean()), step.batch.rewards.double()
    low, high = {"above": (h - 2, h - 1), "inside": (h - 1, h + 1), "below": (h + 1, h + 2)}[where]
    low, high = max(low, 0.0), max(high, 0.0)
    a = {"above": r.clamp_min(0), "inside": group_normalised(step), "below": r.clamp_max(0)}[where]
    method = get_method("entrocraft", form="released", low_first=low, low_last=low, high_first=high, high_last=high)
    compare(step, method, of_policy(step, a[step.ids]))
