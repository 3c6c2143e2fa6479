"""Methods that are a configuration alone, and rewards without labels, against their papers' equations typed out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shaped import SIZES, clipped, compare, group_normalised, make_step, of_policy

from eapo_kernels import METHODS, ShapeError, get_method
from eapo_kernels.objectives.advantages import majority_rewards, semantic_rewards


@pytest.mark.parametrize("name", ["dapo", "cure"])
def test_dapo(name: str) -> None:
    """arXiv 2503.14476: min(rho A, clip(rho, 0.8, 1.28) A), mean over tokens. The learning of CURE (arXiv 2508.11016) too."""
    step = make_step()
    compare(step, get_method(name), of_policy(step, group_normalised(step)[step.ids], low=0.2, high=0.28))


def test_dapo_with_equal_bounds_is_grpo_with_a_token_mean() -> None:
    assert get_method("dapo", clip_high=0.2).config == get_method("grpo", reduction="token_mean").config


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.1)])
def test_gspo(low: float, high: float) -> None:
    """arXiv 2507.18071: s_i = exp(mean_t log ratio), min(s A, clip(s, 1 - low, 1 + high) A), mean over responses."""
    step, method = make_step(1), get_method("gspo", clip_low=low, clip_high=high)
    assert (METHODS["gspo"].config.clip_low, METHODS["gspo"].config.clip_high) == (3e-4, 4e-4)
    a = group_normalised(step)

    def loss(hidden, weight):
        log_ratio = step.logp(hidden, weight) - step.old["logp"]
        s = torch.stack([log_ratio[step.valid & (step.ids == i)].mean().exp() for i in range(len(SIZES))])
        return -clipped(s, a, low, high).mean()

    compare(step, method, loss)


@pytest.mark.parametrize("high", [4.0, 0.02])
def test_cispo(high: float) -> None:
    """arXiv 2506.13585: sg(min(rho, 1 + high)) A log p, mean over all tokens; no token loses its gradient."""
    step, method = make_step(2), get_method("cispo", clip_high=high)
    a, ok = group_normalised(step)[step.ids], step.valid

    def loss(hidden, weight):
        logp = step.logp(hidden, weight)
        rho = (logp - step.old["logp"]).exp().detach()
        return -(rho.clamp(0, 1 + high) * a * logp)[ok].sum() / ok.sum()

    compare(step, method, loss)


def test_t1() -> None:
    """GRPO + kl k3(pi || ref) - c H (arXiv 2501.11651 names the terms; the coefficients are ours)."""
    step, method = make_step(3), get_method("t1", entropy_coef=0.2, kl_coef=0.3)
    assert METHODS["t1"].confidence == "low"
    reference = step.old["logp"] - 0.2
    step = replace(step, batch=replace(step.batch, ref_logp=reference))
    policy = of_policy(step, group_normalised(step)[step.ids], bonus=0.2, mean="responses")

    def loss(hidden, weight):
        delta = reference - step.logp(hidden, weight)
        k3, total = delta.exp() - 1 - delta, torch.zeros((), dtype=torch.float64)
        for i in range(len(SIZES)):
            total = total + k3[step.valid & (step.ids == i)].mean() / len(SIZES)
        return policy(hidden, weight) + 0.3 * total

    compare(step, method, loss)


def test_empo_is_grpo_on_semantic_rewards() -> None:
    """arXiv 2504.05812: r_i = size of i's cluster / G; then GRPO."""
    step, method = make_step(), get_method("empo")
    clusters = torch.tensor([3, 3, 1, 3, 0, 2, 2, 5])
    rewards = semantic_rewards(clusters, step.batch.group_ids)
    torch.testing.assert_close(rewards, torch.tensor([3, 3, 1, 3, 1, 2, 2, 1]) / 4)
    step = replace(step, batch=replace(step.batch, rewards=rewards))
    compare(step, method, of_policy(step, group_normalised(step)[step.ids], mean="responses"))


def test_semantic_rewards() -> None:
    """Groups interleaved; all answers different: zeros; no answer (negative): zero, and it is no cluster of its own."""
    groups = torch.tensor([9, 4, 9, 4, 9, 4, 7])
    clusters = torch.tensor([0, 5, 1, -1, 2, 5, 0])
    torch.testing.assert_close(semantic_rewards(clusters, groups), torch.tensor([0, 2 / 3, 0, 0, 0, 2 / 3, 0]))
    nothing = torch.full((4,), -1)
    assert semantic_rewards(nothing, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 0, 0]
    with pytest.raises(ShapeError, match=r"cluster_ids: expected int64 \[4\] cpu, got float32 \[4\] cpu"):
        semantic_rewards(torch.zeros(4), torch.zeros(4, dtype=torch.int64))


def test_majority_rewards() -> None:
    """arXiv 2504.16084: 1 for the most frequent answer of the group; ties all win; no answer never does."""
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    clusters = torch.tensor([1, 2, 1, 3, 4, 5, -1, -1, -1])
    assert majority_rewards(clusters, groups).tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 0]
