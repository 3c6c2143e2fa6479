"""Methods that lean on a position, a replay buffer or a teacher, and TEA-RL's bonus, against their equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from shaped import SIZES, compare, group_normalised, make_step, of_policy

from eapo_kernels import EapoError, get_method, weight_tokens


def test_exchange_position() -> None:
    """arXiv 2508.02260: b_t = alpha sigmoid(15 (t / len - 0.5)), at most 0.5 |A|; A + sign(A) b_t."""
    step, method = make_step(), get_method("exchange_position", alpha=0.6)
    a = group_normalised(step)[step.ids]
    capped = 0
    for i in range(len(SIZES)):
        tokens = (step.valid & (step.ids == i)).nonzero()[:, 0].tolist()
        for t, token in enumerate(tokens):
            b = 0.6 / (1 + math.exp(-15 * (t / len(tokens) - 0.5)))
            capped += b > 0.5 * abs(float(a[token]))
            a[token] += torch.sign(a[token]) * min(b, 0.5 * abs(float(a[token])))
    assert 0 < capped < int(step.valid.sum())
    compare(step, method, of_policy(step, a))


def test_exchange_position_of_alpha_zero_is_its_base() -> None:
    step = make_step()
    shaped = weight_tokens(get_method("exchange_position", alpha=0), step.batch, step.stats)
    torch.testing.assert_close(shaped.advantages, torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0))


def _covariance(a: torch.Tensor, logp: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    return (a - a[among].mean()) * (logp - logp[among].mean())


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


def test_tea_rl_with_a_bound_of_zero_is_its_base() -> None:
    step = make_step()
    shaped = weight_tokens(get_method("tea_rl", most=0), step.batch, step.stats)
    assert int(shaped.entropy_coef.count_nonzero()) == 0


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
    """arXiv 2509.22601: L_GRPO + coef (1 - cos(pi u / U)) / 2 L_replay, Clip-Cov in the replayed, positive advantages only."""
    step, replayed, given = _with_replay(0)
    method = get_method("spear", full_at=0.4, coef=0.8, ratio=0.1, low=0.1, high=60.0)
    ok, a = step.valid, given[step.ids]
    old, fresh = ok & replayed, ok & ~replayed
    cov = _covariance(a, step.old["logp"], old)
    candidates = old & (cov > 0.1) & (cov < 60.0)
    drawn = torch.rand(len(a), generator=torch.Generator().manual_seed(5))
    chosen = sorted(candidates.nonzero()[:, 0].tolist(), key=lambda t: -float(drawn[t]))[: int(0.1 * int(old.sum()))]
    assert 0 < len(chosen) < int(candidates.sum())
    dropped = torch.zeros_like(old)
    dropped[chosen] = True
    assert (dropped & (a > 0)).any()
    imitated = a.clamp_min(0) * ~dropped

    def loss(hidden, weight):
        ratio = (step.logp(hidden, weight) - step.old["logp"]).exp()
        on_policy = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)[fresh].mean()
        replay = -torch.minimum(ratio * imitated, ratio.clamp(0.8, 1.2) * imitated)[old].mean()
        return on_policy + 0.8 * ramp * replay

    compare(step, method, loss, extras={"replayed": replayed}, progress=progress, seed=5)


def test_spear_without_a_buffer_is_grpo() -> None:
    step = make_step()
    expected = torch.where(step.valid, group_normalised(step)[step.ids].float(), 0.0)
    for extras in ({}, {"replayed": torch.zeros_like(step.valid)}):
        shaped = weight_tokens(get_method("spear"), step.batch, step.stats, extras=extras, progress=0.3)
        torch.testing.assert_close(shaped.advantages, expected)


@pytest.mark.parametrize(("progress", "left"), [(0.0, 1.0), (0.3, 0.4), (0.8, 0.0)])
def test_trace(progress: float, left: float) -> None:
    """Our estimates for arXiv 2605.10194: weighted forward KL on key spans, reverse KL on error spans, GRPO elsewhere."""
    step, method = make_step(2, binary=True), get_method("trace", forward=0.7, reverse=0.3, most=1.2)
    g = torch.Generator().manual_seed(1)
    teacher = step.old["logp"] + 0.4 * torch.randn(len(step.ids), generator=g, dtype=torch.float64)
    spans = torch.rand(len(step.ids), generator=g) > 0.5
    a, correct = group_normalised(step)[step.ids], step.batch.rewards[step.ids] == 1
    for t in range(len(a)):
        if spans[t]:
            gap = float(teacher[t] - step.old["logp"][t])
            guided = 0.7 * min(math.exp(gap), 1.2) if correct[t] else 0.3 * max(-1.2, min(1.2, gap))
            a[t] = left * guided + (1 - left) * a[t]
    extras = {"teacher_logp": teacher, "spans": spans}
    compare(step, method, of_policy(step, a), extras=extras, progress=progress, tolerance=5e-5)


def test_the_forward_estimate_is_unbiased() -> None:
    """E_{y ~ pi}[(teacher / pi)(y) grad log pi(y)] = - grad KL(teacher || pi), over a whole small vocabulary."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.softmax(torch.randn(6, generator=g, dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((teacher * (teacher.log() - log_p)).sum(), logits, retain_graph=True)
    estimate = torch.zeros_like(exact)
    for y in range(6):
        (score,) = torch.autograd.grad(log_p[y], logits, retain_graph=True)
        p = log_p[y].detach().exp()
        estimate += p * (teacher[y] / p) * score
    torch.testing.assert_close(estimate, -exact)


def test_trace_without_marks_guides_all_tokens_of_correct_answers() -> None:
    step = make_step(binary=True)
    extras = {"teacher_logp": step.stats.logp}
    shaped = weight_tokens(get_method("trace"), step.batch, step.stats, extras=extras)
    correct = step.batch.rewards[step.ids] == 1
    expected = torch.where(correct, 1.0, group_normalised(step)[step.ids].float())
    torch.testing.assert_close(shaped.advantages, torch.where(step.valid, expected, 0.0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("exchange_position", {"alpha": -1}, "alpha: expected a finite number >= 0, got -1"),
        ("tea_rl", {"scale": 0}, "scale: expected a finite number > 0, got 0"),
        ("spear", {"full_at": 0}, r"full_at: expected a number in \(0, 1\], got 0"),
        ("spear", {"low": 70.0}, "high: expected a finite number >= 70, got 60.0"),
        ("trace", {"gone_at": 0}, r"gone_at: expected a number in \(0, 1\], got 0"),
        ("trace", {"most": -1}, "most: expected a finite number >= 0, got -1"),
    ],
)
def test_bad_numbers(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(EapoError, match=message):
        get_method(name, **change)
