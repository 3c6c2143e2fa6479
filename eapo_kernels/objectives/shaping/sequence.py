"""Advantages changed by what is known of a response as a whole: its mean entropy, its perplexity, its phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_choice, require_number
from ..config import EAPOConfig
from ..grouping import Partition
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting

_FLAT = 1e-6
"""Standard deviations (nats) below this count as no spread."""


@dataclass(frozen=True)
class AepoAgentic(TokenWeighting):
    """A_t (1 + strength (H_t - mean H) / std H), mean and population std over all valid tokens. With surrogate "balanced_clip".

    Attributes:
        strength: factor on the z-score of the entropy.
    """

    scope: ClassVar[str] = "batch"
    strength: float = 0.2

    def __post_init__(self) -> None:
        require_number("strength", self.strength)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        entropy, std = step_stats.entropy.double(), step_stats.std(step_stats.entropy)
        z = torch.where(std > _FLAT, (entropy - step_stats.mean(entropy)) / std.clamp_min(_FLAT), 0.0)
        return TokenWeights((1 + self.strength * z) * step_stats.token_advantages())


@dataclass(frozen=True)
class Canon(TokenWeighting):
    """Each group is halved by the responses' mean entropy; a response is measured against the other half and its own.

        high half: inter (r - alpha mean_low) + (1 - inter)(r - mean_high)
        low half:  inter (alpha r - mean_high) + (1 - inter)(r - mean_low)

    The low half has n // 2 responses. The authors divide by a constant length of 8192: reduction "fixed_length". A group of one
    has no other half and gets 0 (the released code leaves the reward there).

    Attributes:
        inter: share of the comparison across halves (the authors' lambda).
        alpha: above 1 favours low entropy, below 1 high entropy.
        split_by: "entropy" or "length".
    """

    scope: ClassVar[str] = "group"
    inter: float = 1.0
    alpha: float = 1.0
    split_by: str = "entropy"

    def __post_init__(self) -> None:
        require_number("inter", self.inter, 0, 1)
        require_number("alpha", self.alpha, 0)
        require_choice("split_by", self.split_by, ("entropy", "length"))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        groups, rewards = Partition(step_stats.group_ids), step_stats.raw_rewards().double()
        by = step_stats.sequence_mean(step_stats.entropy) if self.split_by == "entropy" else step_stats.lengths()
        high = groups.rank(by) >= (groups.counts / 2).floor()
        halves = {True: high, False: ~high}
        mean = {k: groups.sum(torch.where(v, rewards, 0.0)) / groups.sum(v.double()).clamp_min(1) for k, v in halves.items()}
        from_high = self.inter * (rewards - self.alpha * mean[False]) + (1 - self.inter) * (rewards - mean[True])
        from_low = self.inter * (self.alpha * rewards - mean[True]) + (1 - self.inter) * (rewards - mean[False])
        advantages = torch.where(groups.counts > 1, torch.where(high, from_high, from_low), 0.0)
        return TokenWeights(step_stats.per_token(advantages))


@dataclass(frozen=True)
class Pear(TokenWeighting):
    """A correct response's reward loses the entropy of its thinking: min(1, success - P), P = max(0, H_think - alpha H_answer).

    H_think and H_answer are means over the tokens before and in the final answer; a response without a final answer is all
    thinking, with H_answer = 0. The config's advantages are then those of the new rewards.

    Attributes:
        alpha: how much entropy in the answer excuses entropy in the thinking (the authors' best of -1, 0, 0.5, 1, 2).
        success: reward of a correct response.
        failure: reward of the others.
        correct_above: a response is correct when its given reward exceeds this.
    """

    scope: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"answer"})
    alpha: float = 1.0
    success: float = 1.0
    failure: float = 0.0
    correct_above: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "success", "failure", "correct_above"):
            require_number(name, getattr(self, name))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        assert step_stats.answer is not None
        phases = {}
        for name, phase in (("think", ~step_stats.answer), ("answer", step_stats.answer)):
            total = step_stats.sequence_sum(torch.where(phase, step_stats.entropy, 0.0))
            phases[name] = total / step_stats.sequence_sum(phase.float()).clamp_min(1)
        penalty = (phases["think"] - self.alpha * phases["answer"]).clamp_min(0)
        correct = step_stats.raw_rewards() > self.correct_above
        rewards = torch.where(correct, (self.success - penalty).clamp_max(1), self.failure)
        return TokenWeights(step_stats.per_token(step_stats.estimator(rewards).float()))


@dataclass(frozen=True)
class ExchangePpl(TokenWeighting):
    """A clamp(1 - alpha s, low, high), s the group's z-score of a response's mean surprisal (log perplexity).

    Mean and population standard deviation of the group are taken without the responses beyond 1.5 interquartile ranges; a
    standard deviation below 1e-6 counts as 1. ``prefer="high"`` turns the sign: improbable responses count more. In the
    released code the weight of "low" is computed and not applied.

    Attributes:
        alpha: factor on the z-score.
        low, high: bounds of the weight.
        prefer: "low" or "high" perplexity.
    """

    scope: ClassVar[str] = "group"
    alpha: float = 0.01
    low: float = 0.8
    high: float = 1.2
    prefer: str = "low"

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, 0)
        require_number("low", self.low, 0)
        require_number("high", self.high, self.low)
        require_choice("prefer", self.prefer, ("low", "high"))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        surprisal, groups = -step_stats.sequence_mean(step_stats.logp).double(), Partition(step_stats.group_ids)
        lower, upper = groups.quantile(surprisal, 0.25), groups.quantile(surprisal, 0.75)
        reach = 1.5 * (upper - lower)
        ordinary = ((surprisal >= lower - reach) & (surprisal <= upper + reach)).double()
        size = groups.sum(ordinary).clamp_min(1)
        mean = groups.sum(ordinary * surprisal) / size
        std = (groups.sum(ordinary * (surprisal - mean).square()) / size).sqrt()
        s = (surprisal - mean) / torch.where(std > _FLAT, std, 1.0)
        sign = 1 if self.prefer == "low" else -1
        weight = (1 - sign * self.alpha * s).clamp(self.low, self.high)
        return TokenWeights(step_stats.per_token(weight * step_stats.advantages()))


METHODS = (
    Method(
        "aepo_agentic",
        EAPOConfig(surrogate="balanced_clip", clip_high=0.28, dual_clip=3.0),
        token_weighting=AepoAgentic(),
        source="2510.14545",
        summary="Uncertain tokens count more, positive tokens far above the old policy keep a bounded gradient; branching the "
        "rollouts is the trainer's.",
        formula="A_t (1 + 0.2 (H_t - mean H) / std H); A > 0 and rho > 1 + eps: (1 + eps) rho / sg(rho) A",
        confidence="medium",
    ),
    Method(
        "canon",
        EAPOConfig(advantage="group_mean", reduction="fixed_length"),
        token_weighting=Canon(),
        source="2509.23962",
        summary="Halves of the group, parted by entropy, are each other's baseline (set fixed_length; the authors' is 8192).",
        formula="high half: r - alpha mean r of the low half; low half: alpha r - mean r of the high half (inter = 1)",
    ),
    Method(
        "pear",
        EAPOConfig(reduction="seq_mean_token_mean"),
        token_weighting=Pear(),
        source="2510.08026",
        summary="Correct answers are worth less the more uncertain the thinking before them was.",
        formula="r = min(1, s - max(0, H_think - alpha H_answer)) where correct; then GRPO",
        confidence="medium",
    ),
    Method(
        "exchange_ppl",
        EAPOConfig(),
        token_weighting=ExchangePpl(),
        source="2508.02260",
        summary="Responses that the policy finds probable, compared with their group, count a little more.",
        formula="A clamp(1 - 0.01 s, 0.8, 1.2), s = z-score in the group of -mean_t log p",
    ),
)
