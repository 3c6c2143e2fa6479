"""The job that is measured: one policy-gradient step on the head, with its float64 truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_kernels import TokenBatch
from eapo_kernels.objectives.advantages import group_norm
from eapo_kernels.testing import Inputs, make_inputs

POSITIVE_WEIGHT, CLIP = 0.7, 0.2


@dataclass(frozen=True)
class Case:
    """One shape with its inputs.

    Attributes:
        n, d, v: tokens, hidden, vocabulary.
        dtype: of hidden and weight.
        inputs_name: "peaked" or "uniform" (see ``make_inputs``).
        inputs: hidden [N, D], weight [V, D], targets [N].
        batch: 16 responses in 4 groups, an old policy 0.2 nats away.
        advantages: [N] fp32, weighted, for providers that take them per token.
    """

    n: int
    d: int
    v: int
    dtype: torch.dtype
    inputs_name: str
    inputs: Inputs
    batch: TokenBatch
    advantages: Tensor

    @property
    def flops(self) -> int:
        """Operations of the three bare products."""
        return 6 * self.n * self.d * self.v

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "D": self.d, "V": self.v, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Truth:
    """The job's results in float64: logp, entropy [N], loss, d_hidden [N, D], d_weight [V, D]."""

    logp: Tensor
    entropy: Tensor
    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def make_case(
    n: int, d: int, v: int, dtype: torch.dtype, *, peaked: bool = True, device: str = "cpu", seed: int = 0
) -> tuple[Case, Truth]:
    """A case and its truth, computed a chunk of rows at a time in float64 without this package's kernels."""
    inputs = make_inputs(n, d, v, dtype=dtype, peaked=peaked, device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rewards = torch.rand(16, generator=generator).to(device)
    group_ids = torch.arange(16, device=device) // 4
    sequence_ids = torch.arange(n, device=device) * 16 // n
    advantages = group_norm(rewards, group_ids)
    weighted = torch.where(advantages > 0, POSITIVE_WEIGHT * advantages, advantages)[sequence_ids]

    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    noise = 0.2 * torch.randn(n, generator=generator).to(device)
    logp, entropy, d_hidden = torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64), hidden.clone()
    old_logp, d_weight, loss = torch.empty(n), torch.zeros_like(weight), torch.zeros((), dtype=torch.float64)
    logp, entropy, old_logp, loss = (t.to(device) for t in (logp, entropy, old_logp, loss))
    for start in range(0, n, 256):
        rows = slice(start, start + 256)
        log_p = torch.log_softmax(hidden[rows] @ weight.T, -1)
        p = log_p.exp()
        index = inputs.targets[rows, None]
        logp[rows] = log_p.gather(1, index)[:, 0]
        entropy[rows] = -(p * log_p).sum(1)
        old_logp[rows] = logp[rows].float() + noise[rows]
        ratio = (logp[rows] - old_logp[rows]).exp()
        gain = weighted[rows].double()
        bounded = ratio.clamp(1 - CLIP, 1 + CLIP) * gain
        loss -= torch.minimum(ratio * gain, bounded).sum() / n
        coefficient = torch.where(bounded < ratio * gain, 0.0, -gain * ratio / n)
        gradient = p.mul_(-coefficient[:, None]).scatter_add_(1, index, coefficient[:, None])
        d_hidden[rows] = gradient @ weight
        d_weight += gradient.T @ hidden[rows]
    batch = TokenBatch(inputs.targets, sequence_ids, rewards, group_ids, old_logp=old_logp)
    case = Case(n, d, v, dtype, "peaked" if peaked else "uniform", inputs, batch, weighted)
    return case, Truth(logp, entropy, loss, d_hidden, d_weight)
