"""The oracle: a dense implementation of the equations of docs/math.md in any float dtype.

The tests compare the kernels with its float64 results. It shares no code with the kernels. Change
it only with a derivation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import IGNORE_INDEX, TokenStats


def logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """z of E1, [..., V]: project, add the bias, scale, soft-cap, divide by the temperature."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if logit_scale is not None:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(inv_temperature, Tensor):
        return z * inv_temperature.to(z.dtype).reshape(inv_temperature.shape + (1,) * (inv_temperature.dim() > 0))
    return z * inv_temperature


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    mask: Tensor | None = None,
    second_moments: bool = False,
    allowed: Tensor | None = None,
) -> TokenStats:
    """E2-E4 in the dtype of ``hidden``, with all logits [..., V] in memory; differentiable.

    allowed: [..., V] bool or None; other logits are -inf (E15).
    """
    z = logits(hidden, weight, bias=bias, inv_temperature=inv_temperature, softcap=softcap, logit_scale=logit_scale)
    if allowed is not None:
        z = z.masked_fill(~allowed, -math.inf)
    valid = targets != IGNORE_INDEX
    if mask is not None:
        valid = valid & mask
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    finite_log_p = torch.where(log_p == -math.inf, torch.zeros_like(log_p), log_p)  # p log p -> 0 as p -> 0

    def keep(values: Tensor) -> Tensor:
        return torch.where(valid, values, torch.zeros_like(values))

    safe_targets = torch.where(valid, targets, torch.zeros_like(targets))
    logp = log_p.gather(-1, safe_targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(p * finite_log_p).sum(-1)
    p2 = p2_logp = varentropy = None
    if second_moments:
        p2 = keep((p * p).sum(-1)).detach()
        p2_logp = keep((p * p * finite_log_p).sum(-1)).detach()
        varentropy = keep((p * (finite_log_p + entropy.unsqueeze(-1)).square()).sum(-1)).detach()
    return TokenStats(keep(logp), keep(entropy), keep(torch.logsumexp(z, dim=-1)), p2, p2_logp, varentropy)


def eapo_loss(
    logp: Tensor,
    old_logp: Tensor,
    sequence_ids: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    positive_weight: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """E10 with group-normalised advantages and the mean over tokens, one token at a time."""
    total = logp.new_zeros(())
    for token in range(logp.numel()):
        i = int(sequence_ids[token])
        group = rewards[group_ids == group_ids[i]].to(logp.dtype)
        mean, reward = group.mean(), rewards[i].to(logp.dtype)
        spread = bool(group.max() > group.min())
        advantage = (reward - mean) / (group.std() + 1e-6) if spread else torch.zeros_like(mean)
        weight = positive_weight if reward > mean else 1.0
        ratio = torch.exp(logp[token] - old_logp[token])
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        total = total - weight * torch.minimum(ratio * advantage, clipped * advantage)
    return total / max(logp.numel(), 1)
