"""Weights from another temperature or a teacher, against their papers' equations typed out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from token_steps import base_advantages, compare, group_normalised, make_step, of_policy, scalars

from eapo_kernels import get_method, weight_tokens


def test_aepo() -> None:
    """arXiv 2510.08141: advantage 1 on the responses of the other temperature, GRPO on the rest."""
    step, method = make_step(2), get_method("aepo")
    marked = (step.ids == 1) | (step.ids == 6)
    groups = step.batch.group_ids.clone()
    groups[1], groups[6] = 7, 8  # the marked ones have groups of their own
    step = replace(step, batch=replace(step.batch, group_ids=groups))
    a = torch.where(marked, 1.0, group_normalised(step)[step.ids])
    compare(step, method, of_policy(step, a), extras={"reinforce": marked})


@pytest.mark.parametrize(("gap", "used"), [(0.03, 0.03), (-0.5, 0.1)])
def test_dcpo(gap: float, used: float) -> None:
    """Beside arXiv 2510.08141: b = min(|H* - H|, 0.1) / share correct, a = b / (1 + b), (1 - a) A + a [correct] p_T / p."""
    step, method = make_step(binary=True), get_method("dcpo")
    h = float(step.old["entropy"][step.valid].mean())
    hot = torch.log_softmax(step.old["log_p"] / 1.2, -1).gather(1, step.batch.targets[:, None])[:, 0]
    correct = step.batch.rewards.double()
    b = used / float(correct.mean())
    a = b / (1 + b)
    factor = (hot - step.old["logp"]).exp()
    advantages = (1 - a) * group_normalised(step)[step.ids] + a * correct[step.ids] * factor
    compare(
        step, method, of_policy(step, advantages), state=scalars(target=h + gap), extras={"tempered_logp": hot}, tolerance=5e-5
    )


def test_dcpo_without_a_correct_answer_or_at_its_target_is_grpo() -> None:
    step = make_step(binary=True)
    extras, h = {"tempered_logp": step.stats.logp + 0.1}, float(step.stats.entropy[step.valid].double().mean())
    wrong = replace(step.batch, rewards=torch.zeros_like(step.batch.rewards))
    weighted = weight_tokens(get_method("dcpo"), wrong, step.stats, state=scalars(target=9.0), extras=extras)
    assert int(weighted.advantages.count_nonzero()) == 0
    weighted = weight_tokens(get_method("dcpo"), step.batch, step.stats, state=scalars(target=h), extras=extras)
    expected = base_advantages(step)
    torch.testing.assert_close(weighted.advantages, expected)


@pytest.mark.parametrize(("progress", "left"), [(0.3, 0.4), (0.8, 0.0)])
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
    """E_{y ~ pi}[(teacher / pi)(y) grad log pi(y)] = - grad KL(teacher || pi), summed over a small vocabulary."""
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


def test_trace_without_marks_guides_all_tokens_of_correct_responses() -> None:
    step = make_step(binary=True)
    extras = {"teacher_logp": step.stats.logp}
    weighted = weight_tokens(get_method("trace"), step.batch, step.stats, extras=extras)
    correct = step.batch.rewards[step.ids] == 1
    expected = torch.where(correct, 1.0, group_normalised(step)[step.ids].float())
    torch.testing.assert_close(weighted.advantages, torch.where(step.valid, expected, 0.0))
