"""What is known about a whole step before its first update, and the reductions that methods take of it.

Every method that weighs tokens by entropy, covariance or position does so here, once a step, over all responses of all
micro-batches and ranks. So a mean over the batch is the mean over the batch, however the batch is cut afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..grouping import Groups


class Shaped(NamedTuple):
    """What a shaper makes of the evidence; None leaves the batch's own. All fp32, none with gradient.

    Attributes:
        advantages: [N], with every weight on the log-prob gradient applied.
        entropy_coef: [N], factor of the token's entropy bonus, as in ``TokenBatch``.
        ratio_penalty: [N], factor of |log(pi / pi_old)|, as in ``TokenBatch``.
        keep: [N] bool, tokens that still count.
    """

    advantages: Tensor
    entropy_coef: Tensor | None = None
    ratio_penalty: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """Statistics of the old policy at every token of a step.

    Attributes:
        valid: [N] bool, tokens that count. Whatever stands at the others is never read.
        sequence_ids: [N] int64 in [0, B); a response's tokens stand in order, and with no others between them.
        rewards: [B] fp32.
        group_ids: [B] int64.
        estimator: rewards [B] -> advantages [B], of the method's config.
        logp, entropy: [N] fp32 (nats).
        p2, p2_logp: [N] fp32, see ``TokenStats``; for shapers that need "second_moments".
        tempered_logp: [N] fp32, log-prob of the token at another temperature; for shapers that need "tempered_logp".
        nucleus_entropy: [N] fp32 (nats), entropy of the renormalised nucleus; for shapers that need "nucleus_entropy".
        teacher_logp: [N] fp32, log-prob under a teacher; for shapers that need "teacher_logp".
        turn_ids: [N] int64, the turn or reasoning step inside the response, counted from 0; zeros when not given.
        answer: [N] bool, tokens of the final answer, after the reasoning; for shapers that need "answer".
        state: numbers of the method's controller, 0-dim tensors by name.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random.
    """

    valid: Tensor
    sequence_ids: Tensor
    rewards: Tensor
    group_ids: Tensor
    estimator: Callable[[Tensor], Tensor]
    logp: Tensor
    entropy: Tensor
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    tempered_logp: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    teacher_logp: Tensor | None = None
    turn_ids: Tensor | None = None
    answer: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    seed: int = 0

    @property
    def n_sequences(self) -> int:
        return self.rewards.numel()

    def advantages(self) -> Tensor:
        """[B] the config's advantages of the rewards."""
        return self.estimator(self.rewards).float()

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """[N] from [B]; 0 at tokens that do not count."""
        return torch.where(self.valid, per_sequence[self._ids()], torch.zeros((), dtype=per_sequence.dtype))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the valid tokens of [N], 0-dim fp64; 0 without any."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.sum() / self.valid.sum().clamp_min(1)

    def std(self, values: Tensor) -> Tensor:
        """Population standard deviation over the valid tokens of [N], 0-dim fp64."""
        return self.mean((values.double() - self.mean(values)).square()).sqrt()

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over the valid tokens of [N], 0-dim; -inf without any."""
        return torch.where(self.valid, values, float("-inf")).amax() if values.numel() else values.new_tensor(float("-inf"))

    def smallest(self, values: Tensor) -> Tensor:
        """Minimum over the valid tokens of [N], 0-dim; inf without any."""
        return -self.largest(-values)

    def lengths(self) -> Tensor:
        """[B] fp32 valid tokens of each response."""
        return self.sequence_sum(torch.ones_like(self.logp))

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[B] fp32: sum over a response's valid tokens of [N]."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.new_zeros(self.n_sequences).index_add_(0, self._ids(), chosen).float()

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[B] fp32: mean over a response's valid tokens of [N]; 0 for a response without any."""
        return self.sequence_sum(values) / self.lengths().clamp_min(1)

    def positions(self) -> Tensor:
        """[N] fp32: how many valid tokens of the response stand before this one."""
        running = self.valid.double().cumsum(0)
        before = self.lengths().double().cumsum(0) - self.lengths().double()
        return torch.where(self.valid, running - 1 - before[self._ids()], 0.0).float()

    def groups(self, values: Tensor) -> Groups:
        """Group statistics of [B]."""
        return Groups(values, self.group_ids)

    def uniform(self) -> Tensor:
        """[N] fp32 uniform random numbers in [0, 1): the same for the same seed on every device and rank."""
        return torch.rand(self.logp.numel(), generator=torch.Generator().manual_seed(self.seed)).to(self.logp.device)

    def _ids(self) -> Tensor:
        return torch.where(self.valid, self.sequence_ids, 0)
