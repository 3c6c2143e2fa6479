"""Weights from an update's first-order entropy change (docs/math.md E7): S_y = p_y (log p_y + H), B = sum p^2 (log p + H)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from ...errors import require
from ...types import TokenStats
from ..config import EAPOConfig
from ..method import Method
from .covariance import largest
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting

_FLAT = 1e-12
"""A standard deviation below this says that there is nothing to tell apart."""


def sampled_part(stats: TokenStats | StepStats) -> Tensor:
    """[...] fp64 S_y = p_y (log p_y + H): above zero where the sampled token is more probable than exp(-H)."""
    assert stats.entropy is not None
    log_p = stats.logp.double()
    return log_p.exp() * (log_p + stats.entropy.double())


def expected_part(stats: TokenStats | StepStats) -> Tensor:
    """[...] fp64 B = sum_v p_v^2 (log p_v + H) = E_p[S]."""
    assert stats.entropy is not None
    assert stats.p2 is not None
    assert stats.p2_logp is not None
    return stats.p2_logp.double() + stats.entropy.double() * stats.p2.double()


@dataclass(frozen=True)
class ClipB(TokenWeighting):
    """Clip_B: tokens of negative advantage with S_y far below the batch's mean lose their gradient.

    The paper's theorem bounds S on both sides; this is the authors' released one-sided rule.

    Attributes:
        mu: how many standard deviations below the mean; larger drops fewer.
    """

    scope: ClassVar[str] = "batch"
    mu: float = 2.5

    def __post_init__(self) -> None:
        require_number("mu", self.mu, 0)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        own = sampled_part(step_stats)
        std = step_stats.std(own)
        dropped = (advantages < 0) & (own - step_stats.mean(own) < -self.mu * std) & (std >= _FLAT)
        return TokenWeights(torch.where(dropped, 0.0, advantages))


@dataclass(frozen=True)
class ClipV(TokenWeighting):
    """Clip_V: tokens of negative advantage with B - S_y above mu standard deviations lose their gradient, the largest first.

    E_y[B - S_y] = 0, so the threshold is not centred, while the standard deviation is about the batch's mean (as released).

    Attributes:
        mu: standard deviations; larger drops fewer.
        max_share: at most this share of all valid tokens is dropped, at least one.
    """

    scope: ClassVar[str] = "batch"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    mu: float = 8.5
    max_share: float = 1e-4

    def __post_init__(self) -> None:
        require_number("mu", self.mu, 0)
        require_number("max_share", self.max_share, 0, 1)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        excess = expected_part(step_stats) - sampled_part(step_stats)
        std = step_stats.std(excess)
        over = step_stats.valid & (advantages < 0) & (excess > self.mu * std) & (std >= _FLAT)
        dropped = largest(excess, over, step_stats.share(self.max_share).clamp_min(1))
        return TokenWeights(torch.where(dropped, 0.0, advantages))


@dataclass(frozen=True)
class PapoLike(TokenWeighting):
    """w_t = 1 - gain clamp(trend / width, -1, 1) sign(P_t), P_t = A_t (B_t - S_t): the lacking polarity counts more.

    P > 0 expands entropy to first order, P < 0 contracts it. The paper (abstract only) names the polarity, a reweighting of
    its two branches and the entropy's trajectory as the signal; how the weights depend on it is our proposal.

    Attributes:
        gain: how far the weights of the branches move from 1, in [0, 1].
        width: relative deviation of the entropy from its moving average at which they have moved all the way.
    """

    scope: ClassVar[str] = "batch"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    state: ClassVar[frozenset[str]] = frozenset({"trend"})
    gain: float = 0.5
    width: float = 0.05

    def __post_init__(self) -> None:
        require_number("gain", self.gain, 0, 1)
        require_number("width", self.width, 0)
        require(self.width > 0, "width", "a finite number > 0", self.width)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        polarity = advantages * (expected_part(step_stats) - sampled_part(step_stats))
        rising = (step_stats.state["trend"] / self.width).clamp(-1, 1)
        return TokenWeights((1 - self.gain * rising * polarity.sign()) * advantages)


METHODS = (
    Method(
        "clip_b",
        EAPOConfig(),
        token_weighting=ClipB(),
        source="2602.03392",
        summary="Wrong answers' tokens of moderate improbability, which would contract the entropy most, are left alone.",
        formula="w_t = 0 where A_t < 0 and S_t - mean S < -mu std S, S = p (log p + H)",
    ),
    Method(
        "clip_v",
        EAPOConfig(),
        token_weighting=ClipV(),
        source="2602.03392",
        summary="As Clip_B, with S measured against its expectation over the vocabulary.",
        formula="w_t = 0 where A_t < 0 and B_t - S_t > mu std(B - S), at most 1e-4 of the tokens, B = sum p^2 (log p + H)",
    ),
    Method(
        "papo_like",
        EAPOConfig(clip_high=0.28),
        controller="entropy_trend",
        token_weighting=PapoLike(),
        source="2605.11775",
        summary="Tokens that would expand the entropy count more while it falls, those that would contract it while it rises.",
        formula="w_t = 1 - gain clamp(trend / width, -1, 1) sign(A_t (B_t - S_t)), trend = H_k / moving average - 1",
        confidence="low",
    ),
)
