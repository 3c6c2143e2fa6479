"""Metrics of a step, as plain numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..records import ScoredRollouts
from .diversity import distinct, ngrams


def reward_metrics(sampled: ScoredRollouts) -> dict[str, float]:
    """Mean and spread of the reward and of the part of every function. All completions must have a
    reward.
    """
    rewards = sampled.scores.total
    spread = torch.stack([rewards[group].std(correction=1 if len(group) > 1 else 0) for group in sampled.groups()])
    result = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item() if len(rewards) > 1 else 0.0,
        "reward/group_std": spread.mean().item(),
        "reward/flat_groups": 1 - len(sampled.varied_groups()) / len(spread),
    }
    for name, part in sampled.scores.parts.items():
        known = torch.tensor([value for value in part if value is not None])
        result[f"reward/{name}/mean"] = known.mean().item() if len(known) else math.nan
        result[f"reward/{name}/std"] = known.std().item() if len(known) > 1 else math.nan
    return result


def call_metrics(drawn: ScoredRollouts) -> dict[str, float]:
    """For every reward function: the failed share of all sampled completions, its seconds, and its
    own measurements.
    """
    scores = drawn.scores
    failed = Counter(failure.function for failure in scores.failures)
    shares = {f"reward/{name}/failed": failed[name] / len(drawn) for name in scores.parts}
    return {**shares, **{f"reward/{name}": value for name, value in scores.measured.items()}}


def completion_metrics(sampled: ScoredRollouts) -> dict[str, float]:
    """Lengths and diversity."""
    rollouts, groups = sampled.rollouts, [ngrams([sampled.texts[i] for i in group], 2) for group in sampled.groups()]
    lengths = torch.tensor([float(len(ids)) for ids in rollouts.completion_ids])
    return {
        "response/length": lengths.mean().item(),
        "response/length_max": lengths.max().item(),
        "response/truncated": sum(rollouts.truncated) / len(rollouts.truncated),
        "diversity/distinct_1": sum(distinct(group[0]) for group in groups) / len(groups),
        "diversity/distinct_2": sum(distinct(group[1]) for group in groups) / len(groups),
    }


def engine_metrics(sampled: ScoredRollouts, old_logp: Tensor, cap: float | None = None) -> dict[str, float]:
    """Difference between the engine's and the trainer's log-probs, and its effect on importance
    weights.

    ``rollout/kl`` is the k3 estimate of KL(engine || trainer)
    (http://joschu.net/blog/kl-approx.html) in nats a token. ``importance_mean`` and
    ``importance_ess`` describe min(exp(gap), cap): its mean, and the effective sample size (sum
    w)^2 / sum w^2 as a share of the tokens. ``importance_capped``, only with a cap, is the share of
    tokens above it. ``ratio_at_start`` is the mean of exp(gap) without a cap: 1 where both compute
    the same distribution, and the probability that top_p, top_k and min_p left where only the
    engine's is cut. ``support`` is the mean number of tokens that they left.

    old_logp: [T] fp32 CPU, the trainer's log-probs of these completions (nats).
    cap: ``loss.importance_cap``; with None the weights are not capped (and not part of the loss).
    """
    gap = old_logp - torch.cat(sampled.rollouts.logp)
    ratios = gap.double().exp()
    weights = ratios if cap is None else ratios.clamp_max(cap)
    support = sampled.rollouts.support
    kept = {} if support is None else {"rollout/support": torch.cat([own.counts for own in support]).double().mean().item()}
    capped = {} if cap is None else {"rollout/importance_capped": (ratios > cap).double().mean().item()}
    return {
        "rollout/logp_gap_mean": gap.abs().mean().item(),
        "rollout/logp_gap_max": gap.abs().max().item(),
        "rollout/kl": (gap.exp() - 1 - gap).mean().item(),
        "rollout/ratio_at_start": ratios.mean().item(),
        "rollout/importance_mean": weights.mean().item(),
        "rollout/importance_ess": (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item(),
        **capped,
        **kept,
    }


def best_and_worst(sampled: ScoredRollouts, count: int) -> list[int]:
    """Indices of up to ``count`` completions: the best, the worst, the second best, and so on."""
    order = sampled.scores.total.argsort(descending=True, stable=True).tolist()
    picked = [i for pair in zip(order, reversed(order), strict=True) for i in pair]
    return list(dict.fromkeys(picked))[:count]


def sample_record(step: int, index: int, sampled: ScoredRollouts) -> dict[str, Any]:
    """The record of one completion in samples.jsonl."""
    return {
        "step": step,
        "prompt": sampled.columns["prompt"][index],
        "completion": sampled.texts[index],
        "answer": sampled.columns["answer"][index],
        "reward": sampled.scores.total[index].item(),
        **{f"reward/{name}": part[index] for name, part in sampled.scores.parts.items()},
    }
