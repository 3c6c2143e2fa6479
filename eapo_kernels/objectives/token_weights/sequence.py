"""Weights from a response or turn: its entropy, perplexity and phases, and the token's position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import require_number
from ..config import EAPOConfig
from .partition import OrderedPartition
from .step import Method, StepStats, TokenWeighting, TokenWeights, choice, number

_FLAT = 1e-6
"""A standard deviation (nats) below this counts as no spread."""

_EPS = 1e-8


@dataclass(frozen=True)
class Canon(TokenWeighting):
    """Each group is split into halves by mean entropy; the baselines are the means of both halves.

        high half: inter (r - alpha mean_low) + (1 - inter)(r - mean_high)
        low half:  inter (alpha r - mean_high) + (1 - inter)(r - mean_low)

    Split by length, alpha is at the rewards of the long half, as in the released code:

        long half:  inter (alpha r - mean_short) + (1 - inter)(r - mean_long)
        short half: inter (r - alpha mean_long) + (1 - inter)(r - mean_short)

    The low or short half has n // 2 of the group's n responses that have tokens. The authors divide by
    a constant length of 8192: reduction "fixed_length". A group of one has no other half and gets 0
    (the released code leaves the reward there).

    Attributes:
        inter: share of the comparison across halves (the authors' lambda).
        alpha: above 1 favours low entropy, or long responses; below 1 the others.
        split_by: "entropy" or "length".
    """

    scope: ClassVar[str] = "group"
    inter: float = number(1.0, 0, 1)
    alpha: float = number(1.0, 0)
    split_by: str = choice("entropy", "length")

    def __call__(self, step: StepStats) -> TokenWeights:
        groups, r = OrderedPartition(step.group_ids, step.present()), step.raw_rewards().double()
        by_entropy = self.split_by == "entropy"
        by = step.sequence_mean(step.entropy) if by_entropy else step.lengths()
        on_high, on_low = (1.0, self.alpha) if by_entropy else (self.alpha, 1.0)
        high = groups.rank(by) >= (groups.counts / 2).floor()

        def mean_of(half: Tensor) -> Tensor:
            return groups.sum(torch.where(half, r, 0.0)) / groups.sum(half.double()).clamp_min(1)

        mean_high, mean_low = mean_of(high), mean_of(~high)
        from_high = self.inter * (on_high * r - on_low * mean_low) + (1 - self.inter) * (r - mean_high)
        from_low = self.inter * (on_low * r - on_high * mean_high) + (1 - self.inter) * (r - mean_low)
        advantages = torch.where(groups.counts > 1, torch.where(high, from_high, from_low), 0.0)
        return TokenWeights(step.per_token(advantages))


@dataclass(frozen=True)
class Pear(TokenWeighting):
    """Reward of a correct response: min(1, success - P), P = max(0, H_think - alpha H_answer).

    H_think and H_answer are mean entropies over the tokens before and in the final answer; a
    response without a final answer is all thinking, with H_answer = 0. The config's advantages are
    then computed from the new rewards, without responses that have no tokens.

    Attributes:
        alpha: factor on the answer's entropy, which offsets the thinking's (the authors' best of
            -1, 0, 0.5, 1, 2).
        success: reward of a correct response.
        failure: reward of the others.
        correct_above: a response is correct when its given reward exceeds this.
    """

    scope: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    alpha: float = number(1.0)
    success: float = number(1.0)
    failure: float = number(0.0)
    correct_above: float = number(0.5)

    def __call__(self, step: StepStats) -> TokenWeights:
        assert step.answer is not None

        def mean_entropy(phase: Tensor) -> Tensor:
            total = step.sequence_sum(torch.where(phase, step.entropy, 0.0))
            return total / step.sequence_sum(phase.float()).clamp_min(1)

        penalty = (mean_entropy(~step.answer) - self.alpha * mean_entropy(step.answer)).clamp_min(0)
        correct = step.raw_rewards() > self.correct_above
        rewards = torch.where(correct, (self.success - penalty).clamp_max(1), self.failure)
        return TokenWeights(step.per_token(step.estimate(rewards, step.present())))


@dataclass(frozen=True)
class ExchangePpl(TokenWeighting):
    """A clamp(1 - alpha s, low, high), s the group's z-score of the response's log perplexity.

    Log perplexity is the mean surprisal. Mean and population standard deviation of the group leave
    out responses without tokens and those beyond 1.5 interquartile ranges; a standard deviation below 1e-6 counts as 1. The
    released code computes the weight of prefer="low" and does not apply it. Source: arXiv
    2508.02260.

    Attributes:
        alpha: factor on the z-score.
        low, high: bounds of the weight.
        prefer: the perplexity that gets the larger weight, "low" or "high".
    """

    scope: ClassVar[str] = "group"
    alpha: float = number(0.01, 0)
    low: float = number(0.8, 0)
    high: float = 1.2
    prefer: str = choice("low", "high")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("high", self.high, self.low)

    def __call__(self, step: StepStats) -> TokenWeights:
        surprisal, groups = -step.sequence_mean(step.logp).double(), OrderedPartition(step.group_ids, step.present())
        lower, upper = groups.quantile(surprisal, 0.25), groups.quantile(surprisal, 0.75)
        reach = 1.5 * (upper - lower)
        ordinary = ((surprisal >= lower - reach) & (surprisal <= upper + reach)).double()
        size = groups.sum(ordinary).clamp_min(1)
        mean = groups.sum(ordinary * surprisal) / size
        std = (groups.sum(ordinary * (surprisal - mean).square()) / size).sqrt()
        s = (surprisal - mean) / torch.where(std > _FLAT, std, 1.0)
        sign = 1 if self.prefer == "low" else -1
        weight = (1 - sign * self.alpha * s).clamp(self.low, self.high)
        return TokenWeights(step.per_token(weight * step.advantages()))


@dataclass(frozen=True)
class ExchangePosition(TokenWeighting):
    """A_t + sign(A_t) min(alpha sigmoid(steepness (t / length - 0.5)), 0.5 |A_t|).

    t = 0, 1, ... counts the response's tokens. Source: arXiv 2508.02260.

    Attributes:
        alpha: the largest bonus (0.1 in the authors' script, 0.05 in a saved run).
        steepness: of the sigmoid.
    """

    scope: ClassVar[str] = "sequence"
    alpha: float = number(0.1, 0)
    steepness: float = number(15.0, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        position = step.positions() / step.per_token(step.lengths()).clamp_min(1)
        bonus = torch.minimum(self.alpha * (self.steepness * (position - 0.5)).sigmoid(), 0.5 * advantages.abs())
        return TokenWeights(advantages + advantages.sign() * bonus)


def _unit_range(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(values - low) / (high - low + 1e-8): in [0, 1]."""
    return (values - low) / (high - low + _EPS)


@dataclass(frozen=True)
class Aem(TokenWeighting):
    """w = exp(-strength h) / mean_G exp(-strength h), h the scaled mean entropy of the turn.

    h is scaled to [0, 1] over the group's turns. Turns of low entropy get a larger weight, for both
    signs of the advantage. Where all turns are equal, every weight is 1.

    Attributes:
        strength: factor in the exponent; 0 turns the method off. The paper's value is not known to
            us.
    """

    scope: ClassVar[str] = "group"
    uses: ClassVar[frozenset[str]] = frozenset({"turn_ids"})
    strength: float = number(1.0, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        turns = step.by_turn()
        groups = OrderedPartition(step.group_ids[step.sequence_ids], step.valid)
        entropy = turns.mean(step.entropy)
        raised = (-self.strength * _unit_range(entropy, groups.min(entropy), groups.max(entropy))).exp()
        one_each = 1 / turns.counts.double()
        mean = groups.sum(raised * one_each) / groups.sum(one_each).clamp_min(_EPS)
        return TokenWeights(raised / mean.clamp_min(_EPS) * step.token_advantages())


@dataclass(frozen=True)
class Empg(TokenWeighting):
    """A g(h_t) + zeta f(h_{t+1}), centred; g = exp(-k h) / mean exp(-k h), f = exp(-k_future h).

    h is the mean entropy of a turn, scaled to [0, 1] over all turns of the batch; the last turn of
    a response has no second term. The mean over all turns of the batch is subtracted at the end
    (paper, eqs. 7 and 10 to 12).

    Attributes:
        k, k_future: decay with entropy of the weight, and of the bonus for the next turn.
        zeta: factor of the bonus for a next turn of low entropy.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"turn_ids"})
    k: float = number(1.0, 0)
    k_future: float = number(1.0, 0)
    zeta: float = number(0.1)

    def __call__(self, step: StepStats) -> TokenWeights:
        turns = step.by_turn()
        entropy = turns.mean(step.entropy)
        h = _unit_range(entropy, step.min(entropy), step.max(entropy))
        gain = (-self.k * h).exp()
        gain = gain / (turns.mean_of_classes(gain) + _EPS)
        next_in_response = turns.following(step.sequence_ids, -1.0) == step.sequence_ids
        bonus = torch.where(next_in_response, turns.following((-self.k_future * h).exp(), 0.0), 0.0)
        advantages = gain * step.token_advantages() + self.zeta * bonus
        return TokenWeights(advantages - turns.mean_of_classes(advantages))


METHODS = (
    Method("canon", EAPOConfig(advantage="group_mean", reduction="fixed_length"), token_weighting=Canon(),
        source="2509.23962",
        summary="Halves of the group, split by entropy, are each other's baseline (set fixed_length; the authors' is 8192).",
        formula="high half: r - alpha mean r of the low half; low half: alpha r - mean r of the high half (inter = 1)"),
    Method("pear", EAPOConfig(reduction="seq_mean_token_mean"), token_weighting=Pear(), source="2510.08026",
        confidence="medium",
        summary="The reward of a correct answer falls with the entropy of the thinking before it.",
        formula="r = min(1, s - max(0, H_think - alpha H_answer)) where correct; then GRPO"),
    Method("exchange_ppl", EAPOConfig(), token_weighting=ExchangePpl(), source="2508.02260",
        summary="Responses that are more probable under the policy than the others of their group get a larger weight.",
        formula="A clamp(1 - 0.01 s, 0.8, 1.2), s = z-score in the group of -mean_t log p"),
    Method("exchange_position", EAPOConfig(), token_weighting=ExchangePosition(), source="2508.02260",
        summary="A bonus in the direction of the advantage for tokens towards the end of a response.",
        formula="A + sign(A) min(0.1 sigmoid(15 (t / length - 0.5)), 0.5 |A|)"),
    Method("aem", EAPOConfig(), token_weighting=Aem(), source="2605.00425", confidence="medium",
        summary="Turns of low mean entropy, compared with the group's turns, get a larger weight.",
        formula="A exp(-lambda h) / mean_G exp(-lambda h), h = turn's mean entropy, min-max scaled in the group"),
    Method("empg", EAPOConfig(), token_weighting=Empg(), source="2509.09265",
        summary="Turns of low mean entropy get a larger weight, and a turn before one of low entropy gets a bonus.",
        formula="A g(h_t) + 0.1 f(h_{t+1}) - mean, g = exp(-h) / mean exp(-h), f = exp(-h)"),
)  # fmt: skip
