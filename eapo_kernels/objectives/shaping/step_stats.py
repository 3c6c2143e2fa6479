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

from ...errors import require
from ..grouping import Groups, Partition


class TokenWeights(NamedTuple):
    """What a token_weighting makes of the step_stats; None leaves the batch's own. None with gradient.

    Attributes:
        advantages: [N], with every weight on the log-prob gradient applied.
        entropy_coef: [N], factor of the token's entropy bonus, as in ``TokenBatch``.
        ratio_penalty: [N], factor of |log(pi / pi_old)|, as in ``TokenBatch``.
        keep: [N] bool, tokens that still count; the others leave the denominators too.
    """

    advantages: Tensor
    entropy_coef: Tensor | None = None
    ratio_penalty: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True)
class StepStats:
    """Statistics of the old policy at every token of a step.

    Attributes:
        valid: [N] bool, tokens that count. Whatever stands at the others is never read.
        sequence_ids: [N] int64 in [0, B); a response's tokens stand in order, and with no others between them. 0 at tokens that
            do not count.
        rewards: [B] fp32.
        group_ids: [B] int64.
        estimator: rewards [B] -> advantages [B], of the method's config.
        given: [B] fp32, advantages that the batch brings along instead; or None.
        scale: [N] fp32, what the config's reduction would multiply a token's term by, were the whole step one batch.
        logp, entropy: [N] fp32 (nats).
        p2, p2_logp: [N] fp32, see ``TokenStats``; for token weightings that need "second_moments".
        tempered_logp: [N] fp32, log-prob of the token at another temperature; for token weightings that need "tempered_logp".
        nucleus_entropy: [N] fp32 (nats), entropy of the renormalised nucleus; for token weightings that need "nucleus_entropy".
        teacher_logp: [N] fp32, log-prob under a teacher; for token weightings that need "teacher_logp".
        answer: [N] bool, tokens of the final answer, after the reasoning; for token weightings that need "answer".
        turn_ids: [N] int64 >= 0, the turn or reasoning step inside the response, rising; None: one turn.
        reinforce: [N] bool, tokens of responses that were sampled at another temperature to steer the entropy; or None.
        replayed: [N] bool, tokens of responses from a replay buffer; or None.
        spans: [N] bool, key tokens of correct and error tokens of wrong responses; or None.
        state: numbers of the method's controller, 0-dim tensors by name.
        progress: share of the training that is done, in [0, 1].
        seed: for methods that draw at random.
    """

    valid: Tensor
    sequence_ids: Tensor
    rewards: Tensor
    group_ids: Tensor
    estimator: Callable[[Tensor], Tensor]
    given: Tensor | None
    scale: Tensor
    logp: Tensor
    entropy: Tensor
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    tempered_logp: Tensor | None = None
    nucleus_entropy: Tensor | None = None
    teacher_logp: Tensor | None = None
    answer: Tensor | None = None
    turn_ids: Tensor | None = None
    reinforce: Tensor | None = None
    replayed: Tensor | None = None
    spans: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    seed: int = 0

    @property
    def n_sequences(self) -> int:
        return self.rewards.numel()

    def advantages(self) -> Tensor:
        """[B] fp32, the batch's own or else the config's advantages of the rewards."""
        return self.estimator(self.rewards).float() if self.given is None else self.given

    def token_advantages(self) -> Tensor:
        """[N] fp32 ``advantages`` of each token's response."""
        return self.per_token(self.advantages())

    def raw_rewards(self) -> Tensor:
        """[B] fp32, for methods that make their own advantages; refuses a batch that brings advantages along."""
        require(self.given is None, "batch.advantages", "None with a method that makes its own of the rewards", "a tensor")
        return self.rewards

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """[N] from [B]; 0 at tokens that do not count."""
        own = per_sequence[self.sequence_ids]
        return torch.where(self.valid, own, torch.zeros_like(own))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the valid tokens of [N], 0-dim fp64; 0 without any."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.sum() / self.valid.sum().clamp_min(1)

    def std(self, values: Tensor) -> Tensor:
        """Population standard deviation over the valid tokens of [N], 0-dim fp64."""
        return self.mean((values.double() - self.mean(values)).square()).sqrt()

    def share(self, fraction: float) -> Tensor:
        """0-dim int64: this fraction of the number of valid tokens, rounded down."""
        return (fraction * self.valid.sum().double()).long()

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over the valid tokens of [N], 0-dim; -inf without any."""
        return torch.where(self.valid, values, float("-inf")).amax() if values.numel() else values.new_tensor(float("-inf"))

    def smallest(self, values: Tensor) -> Tensor:
        """Minimum over the valid tokens of [N], 0-dim; inf without any."""
        return -self.largest(-values)

    def by_sequence(self, among: Tensor | None = None) -> Partition:
        """The valid tokens, or those of them in ``among`` [N] bool, by response."""
        return Partition(self.sequence_ids, self.valid if among is None else self.valid & among)

    def by_turn(self) -> Partition:
        """The valid tokens by response and turn; turns of a response stand next to each other in the order of the classes."""
        if self.turn_ids is None:
            return self.by_sequence()
        turns = torch.where(self.valid, self.turn_ids, 0)
        width = turns.amax() + 1 if turns.numel() else 1
        return Partition(self.sequence_ids * width + turns, self.valid)

    def lengths(self) -> Tensor:
        """[B] fp32 valid tokens of each response."""
        return self.sequence_sum(torch.ones_like(self.logp))

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[B] fp32: sum over a response's valid tokens of [N]."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.new_zeros(self.n_sequences).index_add_(0, self.sequence_ids, chosen).float()

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[B] fp32: mean over a response's valid tokens of [N]; 0 for a response without any."""
        return self.sequence_sum(values) / self.lengths().clamp_min(1)

    def positions(self) -> Tensor:
        """[N] fp32: how many valid tokens of the response stand before this one."""
        return self.by_sequence().rank(torch.zeros_like(self.logp)).float()

    def groups(self, values: Tensor) -> Groups:
        """Group statistics of [B]."""
        return Groups(values, self.group_ids)

    def uniform(self) -> Tensor:
        """[N] fp32 uniform random numbers in [0, 1): the same for the same seed on every device and rank."""
        return torch.rand(self.logp.numel(), generator=torch.Generator().manual_seed(self.seed)).to(self.logp.device)
