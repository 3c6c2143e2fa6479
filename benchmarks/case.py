"""The job that is measured: one policy-gradient step on the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eapo_kernels import TokenBatch
from eapo_kernels.objectives.advantages import group_norm
from eapo_kernels.testing import make_inputs
from eapo_kernels.types import IGNORE_INDEX

from . import real_rows

POSITIVE_WEIGHT, CLIP = 0.7, 0.2
N_RESPONSES, GROUP_SIZE = 16, 4

MODES = ("fwd", "fwd_bwd", "frozen_head", "half_zero_rows")
"""fwd: log-prob and entropy of every token. fwd_bwd: policy loss and both gradients. frozen_head: d_hidden only.
half_zero_rows: fwd_bwd where the second half of every response is masked, as padding is."""

INPUTS = ("peaked", "uniform", "steep", "real")
"""peaked, uniform: see ``make_inputs``. steep: peaked with all logits doubled, where rounding logits hurts most.
real: hidden states and head of SmolLM2-135M, see ``benchmarks.real_rows``."""

_PRODUCTS = {"fwd": 1, "fwd_bwd": 3, "frozen_head": 2, "half_zero_rows": 3}
_EXACT_ROWS = 256


@dataclass(frozen=True)
class Case:
    """One shape with its inputs: 16 responses of equal length in 4 groups, an old policy 0.2 nats away.

    Attributes:
        inputs_name: one of ``INPUTS``.
        hidden: [N, D].
        weight: [V, D].
        targets: [N] int64, -100 where ``valid`` is False.
        valid: [N] bool, the tokens that count.
        batch: the same for ``eapo_loss``, with rewards and old log-probs.
        advantages: [N] fp32, weighted, for providers that take them per token.
        lse, logp, entropy: [N] float64 truth of every row, masked ones too.
        largest_logit: max |z| over the matrix.
    """

    inputs_name: str
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    valid: Tensor
    batch: TokenBatch
    advantages: Tensor
    lse: Tensor
    logp: Tensor
    entropy: Tensor
    largest_logit: float

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def d(self) -> int:
        return self.hidden.shape[1]

    @property
    def v(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def old_logp(self) -> Tensor:
        """[N] fp32."""
        assert self.batch.old_logp is not None
        return self.batch.old_logp

    @property
    def n_valid(self) -> int:
        return int(self.valid.sum())

    def useful_flops(self, mode: str) -> int:
        """Operations of the matrix products that the job needs."""
        return 2 * _PRODUCTS[mode] * self.n_valid * self.d * self.v

    def least_bytes(self, mode: str) -> int:
        """Bytes of operands and results, each moved once: hidden, weight, and their gradients where the mode wants them."""
        hidden, weight = self.n_valid * self.d, self.v * self.d
        gradients = {"fwd": 0, "frozen_head": hidden}.get(mode, hidden + weight)
        return (hidden + weight + gradients) * self.hidden.element_size()

    def shape(self) -> dict[str, int | str]:
        return {"N": self.n, "D": self.d, "V": self.v, "dtype": str(self.dtype).removeprefix("torch.")}

    def for_mode(self, mode: str) -> Case:
        """This case, or the one with half of its rows masked."""
        if mode != "half_zero_rows":
            return self
        length = self.n // N_RESPONSES
        valid = torch.arange(self.n, device=self.hidden.device) % length < (length + 1) // 2
        targets = torch.where(valid, self.targets, IGNORE_INDEX)
        return replace(self, targets=targets, valid=valid, batch=replace(self.batch, targets=targets, mask=valid))


def policy_loss(case: Case, logp: Tensor) -> Tensor:
    """The EAPO loss written by hand: clipped surrogate of weighted advantages, mean over the valid tokens (E9, E10).

    logp: [N]; rows that are not valid may hold any finite number.
    """
    ratio = (logp - case.old_logp.to(logp.dtype)).exp()
    gain = torch.minimum(ratio * case.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * case.advantages)
    return -(gain * case.valid).sum() / case.valid.sum()


def make_case(
    n: int, d: int, v: int, dtype: torch.dtype, *, inputs: str = "peaked", device: str = "cpu", seed: int = 0
) -> Case:
    """A case; ``n`` must be a multiple of the 16 responses. Raises ValueError for sizes or inputs that cannot be."""
    if n % N_RESPONSES:
        raise ValueError(f"n: expected a multiple of {N_RESPONSES}, got {n}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs: expected one of {', '.join(INPUTS)}, got {inputs!r}")
    if inputs == "real":
        made = real_rows.load(n, d, v, dtype, device)
    else:
        made = make_inputs(n, d, v, dtype=dtype, peaked=inputs != "uniform", device=device, seed=seed)
        if inputs == "steep":
            made.hidden.mul_(2)
    generator = torch.Generator().manual_seed(seed + 1)
    rewards = torch.rand(N_RESPONSES, generator=generator).to(device)
    group_ids = torch.arange(N_RESPONSES, device=device) // GROUP_SIZE
    sequence_ids = torch.arange(n, device=device) * N_RESPONSES // n
    advantages = group_norm(rewards, group_ids)
    weighted = torch.where(advantages > 0, POSITIVE_WEIGHT * advantages, advantages)[sequence_ids]
    lse, logp, entropy, largest = _exact_statistics(made.hidden, made.weight, made.targets)
    old_logp = logp.float() + 0.2 * torch.randn(n, generator=generator).to(device)
    batch = TokenBatch(made.targets, sequence_ids, rewards, group_ids, old_logp=old_logp)
    valid = torch.ones(n, dtype=torch.bool, device=device)
    return Case(inputs, made.hidden, made.weight, made.targets, valid, batch, weighted, lse, logp, entropy, largest)


def _exact_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(lse, logp, entropy) [N] float64 and max |z|, a few rows at a time, without this package's kernels."""
    wide, parts, largest = weight.double(), [], 0.0
    for start in range(0, hidden.shape[0], _EXACT_ROWS):
        rows = slice(start, start + _EXACT_ROWS)
        z = hidden[rows].double() @ wide.T
        largest = max(largest, float(z.abs().max()))
        lse = torch.logsumexp(z, -1)
        logp = z.gather(1, targets[rows, None])[:, 0] - lse
        z -= lse[:, None]
        parts.append(torch.stack([lse, logp, -(z.exp() * z).sum(1)]))
    lse, logp, entropy = torch.cat(parts, 1)
    return lse, logp, entropy, largest
