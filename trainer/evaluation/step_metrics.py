"""Metrics of a step, as plain numbers: rewards, completions, log-probs of the engine, cost."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..models.limits import heads_of
from ..models.policy import Policy
from ..records import Rollouts, ScoredRollouts
from .diversity import distinct

PHASES = {
    "rollout": ("rollouts", "sync"), "reward": ("rewards",), "measurement": ("measurement",), "update": ("update",),
}  # fmt: skip
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
"""Part of a GPU's name -> its FLOP/s in dense bf16 products by NVIDIA's data sheets. The first match counts."""


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
    """For every reward function the failed share of all sampled completions, and its seconds."""
    scores = drawn.scores
    failed = Counter(failure.function for failure in scores.failures)
    shares = {f"reward/{name}/failed": failed[name] / len(drawn) for name in scores.parts}
    return {**shares, **{f"reward/{name}/seconds": seconds for name, seconds in scores.seconds.items()}}


def completion_metrics(sampled: ScoredRollouts) -> dict[str, float]:
    """Lengths and diversity."""
    truncated, lengths = sampled.rollouts.truncated, [len(ids) for ids in sampled.rollouts.completion_ids]
    groups = [[sampled.texts[i] for i in group] for group in sampled.groups()]
    return {
        "response/length": sum(lengths) / len(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated": sum(truncated) / len(truncated),
        **{f"diversity/distinct_{n}": sum(distinct(texts, n) for texts in groups) / len(groups) for n in (1, 2)},
    }


def engine_metrics(sampled: ScoredRollouts, old_logp: Tensor, cap: float | None = None) -> dict[str, float]:
    """Difference between the engine's and the trainer's log-probs, and its effect on the importance
    weights min(exp(difference), cap).

    ``importance_ess``: their effective sample size (sum w)^2 / sum w^2 as a share of the tokens;
    ``importance_capped``: the share of tokens above the cap. ``ratio_at_start``: mean of
    exp(difference), 1 where both compute the same distribution, and the probability that top_p,
    top_k and min_p left where only the engine's is cut. ``support``: mean number of tokens left.

    old_logp: [T] fp32 CPU, the trainer's log-probs of these completions (nats).
    cap: ``loss.importance_cap``; with None the weights are not capped (and not part of the loss).
    """
    gap = old_logp - torch.cat(sampled.rollouts.logp)
    ratios = gap.double().exp()
    weights = ratios if cap is None else ratios.clamp_max(cap)
    metrics = {
        "logp_gap_mean": gap.abs().mean(),
        "logp_gap_max": gap.abs().max(),
        "ratio_at_start": ratios.mean(),
        "importance_ess": weights.sum() ** 2 / (len(weights) * (weights**2).sum()),
    }
    if cap is not None:
        metrics["importance_capped"] = (ratios > cap).double().mean()
    if sampled.rollouts.support is not None:
        metrics["support"] = torch.cat([own.counts for own in sampled.rollouts.support]).double().mean()
    return {f"rollout/{name}": value.item() for name, value in metrics.items()}


def cost_metrics(
    policy: Policy, drawn: ScoredRollouts, sampled: ScoredRollouts, seconds: Mapping[str, float], *, passes: float, epochs: int
) -> dict[str, float]:
    """Shares of the step's time, tokens a second of generation, peak memory, and on a known GPU the
    share of its peak FLOP/s (``mfu``) that the model needed on all ranks.

    FLOPs are those of the model without padding, recomputation and repeated prompts of a group: one
    forward pass each to generate and to measure, three to update (two where weights are frozen,
    which need no gradient), for the groups whose rewards differ.

    Args:
        drawn, sampled: all completions of the step, and those that it measures.
        seconds: phase -> its time in the step.
        passes: forward passes that measure: the share of the completions whose old log-probs were
            computed, and one for a reference or diagnostics each.
        epochs: passes over the completions in the update.
    """
    total, generation = sum(seconds.values()), seconds["rollouts"]
    tokens = {"prompt": drawn.rollouts.prompt_ids, "completion": drawn.rollouts.completion_ids}
    metrics = {
        **{f"share/{name}": sum(seconds.get(phase, 0.0) for phase in own) / total for name, own in PHASES.items()},
        **{f"tokens/{name}_per_second": sum(map(len, ids)) / generation for name, ids in tokens.items()},
        "memory/peak_gib": max(ranks.all_gather(lambda: peak_gib(policy.device))),
    }
    name = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else ""
    if peak := next((flops for part, flops in PEAK_FLOPS.items() if part in name), None):
        trained = [i for group in sampled.varied_groups() for i in group]
        backward = 2 if all(weight.requires_grad for weight in policy.parameters()) else 1
        flops = forward_flops(policy, drawn.rollouts, [group[0] for group in drawn.groups()])
        flops += passes * forward_flops(policy, sampled.rollouts)
        flops += epochs * (1 + backward) * forward_flops(policy, sampled.rollouts.take(trained))
        metrics["mfu"] = flops / (total * peak * ranks.size())
    return metrics


def forward_flops(policy: Policy, rollouts: Rollouts, prompts: Sequence[int] | None = None) -> float:
    """FLOPs of one forward pass over prompts and completions: two for each weight and token, where
    the head sees completion tokens alone, embeddings are looked up and a token passes through
    ``num_experts_per_tok`` of the experts, and four for each pair of tokens in causal attention, layer
    and width of the heads. Layers without attention are counted like the others.

    prompts: the completions whose prompts count; all without it.
    """
    model = policy.language_model
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(weight.numel() for weight in policy.parameters()) - embedding.numel()
    body -= 0 if head is embedding else head.numel()
    for name, weight in policy.named_parameters():
        if ".experts." in name and weight.dim() == 3:  # [experts, ...]
            body -= weight[0].numel() * (len(weight) - getattr(config, "num_experts_per_tok", len(weight)))
    width = math.prod(heads_of(config))
    flops, counted = 0.0, None if prompts is None else set(prompts)
    for i, (prompt, completion) in enumerate(zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)):
        before = 0 if counted is None or i in counted else len(prompt)
        length = len(prompt) + len(completion)
        pairs = (length**2 - before**2) / 2
        flops += 2 * body * (length - before) + 2 * head.numel() * len(completion)
        flops += 4 * pairs * config.num_hidden_layers * width
    return flops


def peak_gib(device: torch.device) -> float:
    """Most memory since the latest call that PyTorch has allocated on a GPU, or on a CPU that the
    process has held since its start (GiB).
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def sample_records(step: int, sampled: ScoredRollouts, count: int) -> list[dict[str, Any]]:
    """Records in samples.jsonl of up to ``count`` completions: the best, the worst, the second best,
    and so on.
    """
    scores = sampled.scores
    order = scores.total.argsort(descending=True, stable=True).tolist()
    picked = dict.fromkeys(i for pair in zip(order, reversed(order), strict=True) for i in pair)
    return [
        {
            "step": step,
            "prompt": sampled.columns["prompt"][i],
            "completion": sampled.texts[i],
            "answer": sampled.columns["answer"][i],
            "reward": scores.total[i].item(),
            **{f"reward/{name}": part[i] for name, part in scores.parts.items()},
        }
        for i in list(picked)[:count]
    ]
