"""What a step costs: time by phase, tokens a second, memory, and model FLOPs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch

from .. import ranks
from ..models.policy import Policy
from ..records import Rollouts, ScoredRollouts

PHASES = {
    "rollout": ("rollouts", "sync"), "reward": ("rewards",), "measurement": ("old_logp", "entropies"), "update": ("update",),
}  # fmt: skip
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip
"""Part of a GPU's name -> its FLOP/s in dense bf16 products by NVIDIA's data sheets. The first match counts."""


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
    the head sees completion tokens alone and embeddings are looked up, and four for each pair of
    tokens in causal attention, layer and width of the heads.

    prompts: the completions whose prompts count; all without it.
    """
    model = policy.language_model
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(weight.numel() for weight in policy.parameters()) - embedding.numel()
    body -= 0 if head is embedding else head.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
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
