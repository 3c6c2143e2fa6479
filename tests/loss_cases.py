"""A batch with everything a loss can read, a configuration for every switch, and how the tests of losses call one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eapo_kernels import (
    EAPOConfig,
    LossOutput,
    Options,
    TokenBatch,
    eapo_loss,
    policy_loss,
    reference,
)
from eapo_kernels.testing import Inputs

N, D, V, B = 150, 24, 301, 12


def make_batch(inputs: Inputs, *, seed: int = 3, off_policy: float = 0.3, masked: bool = True) -> TokenBatch:
    """Twelve responses of uneven length in three groups; a tied reward, masked tokens, all optional log-probs."""
    generator = torch.Generator().manual_seed(seed)
    device = inputs.hidden.device
    wide = inputs.to(torch.float64)
    with torch.no_grad():
        bias = None if wide.bias is None else wide.bias.detach()
        logp = reference.token_stats(wide.hidden.detach(), wide.weight.detach(), wide.targets, bias=bias).logp.float().cpu()
    n = inputs.targets.numel()
    old = logp + off_policy * torch.randn(n, generator=generator)
    rewards = torch.rand(B, generator=generator)
    rewards[0] = rewards[1:4].mean()  # a tie with its group's mean
    mask = torch.rand(n, generator=generator) > 0.2 if masked else None
    batch = TokenBatch(
        targets=inputs.targets,
        sequence_ids=torch.randint(B, (n,), generator=generator).sort().values,
        rewards=rewards,
        group_ids=torch.tensor([7, 7, 7, 7, -1, -1, -1, -1, 3, 3, 3, 3]),
        old_logp=old,
        mask=mask,
        ref_logp=old + 0.1 * torch.randn(n, generator=generator),
        rollout_logp=old - 0.2 * torch.randn(n, generator=generator),
    )
    moved = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **moved)


def run(inputs: Inputs, batch: TokenBatch, **options: Any) -> tuple[LossOutput, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias) if t is not None]
    call = policy_loss if "method" in options else eapo_loss
    out = call(leaves[0], leaves[1], batch, bias=leaves[2] if len(leaves) > 2 else None, **options)
    return out, list(torch.autograd.grad(out.loss, leaves))


def small_options() -> Options:
    return Options(memory_budget=V * 4 * 64)


CONFIGS = {
    "default": EAPOConfig(),
    "asymmetric_dual": EAPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.5),
    "entropy_bonus": EAPOConfig(entropy_coef=0.05),
    "kl_k1": EAPOConfig(kl_coef=0.1, kl_estimator="k1"),
    "kl_k2": EAPOConfig(kl_coef=0.1, kl_estimator="k2"),
    "kl_k3": EAPOConfig(kl_coef=0.1, kl_estimator="k3"),
    "importance": EAPOConfig(importance_cap=1.1),
    "reinforce": EAPOConfig(surrogate="reinforce"),
    "cispo": EAPOConfig(surrogate="cispo"),
    "gspo": EAPOConfig(surrogate="gspo", reduction="seq_mean_token_mean", clip_low=0.05, clip_high=0.05),
    "group_mean": EAPOConfig(advantage="group_mean", reduction="seq_mean_token_sum"),
    "sign_fixed": EAPOConfig(advantage="sign", reduction="fixed_length", fixed_length=40),
    "batch": EAPOConfig(advantage="batch_norm", split="batch", negative_weight=0.5),
    "dropped": EAPOConfig(split="advantage", negative_weight=0.0, drop_zero_weight=True),
}
