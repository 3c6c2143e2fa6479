"""Weights from the first-order entropy change of an update (docs/math.md E7).

S_y = p_y (log p_y + H) and B = sum_v p_v^2 (log p_v + H) = E_p[S].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...types import TokenStats
from ..config import EAPOConfig
from .step import Method, StepStats, TokenWeighting, TokenWeights, choice, number

_FLAT = 1e-12
"""A standard deviation below this counts as zero: no token is dropped."""


def sampled_part(stats: TokenStats | StepStats) -> Tensor:
    """[...] fp64 S_y = p_y (log p_y + H): positive where log p_y > -H."""
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
class Steer(TokenWeighting):
    """w_t = exp(-alpha |Omega_t| / max |Omega|), alpha = -ln(lambda_min).

    Omega_t = A_t p_t (1 - p_t)(log p_t + H_t) is the first-order entropy change when only the
    token's own logit moves. The theorem's factor rho is 1 at the old policy, where the weights are
    fixed.

    Attributes:
        lambda_min: the smallest weight, in (0, 1].
        form: "theorem"; or "released", the authors' code: A / p_t in place of A, the maximum at
            least 0.02, and the weight clamped to [lambda_min, 1].
    """

    lambda_min: float = number(0.8, 0, 1)
    form: str = choice("theorem", "released")

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        log_p = step.logp.double()
        omega = (advantages * -log_p.expm1() * (log_p + step.entropy)).abs()
        if self.form == "theorem":
            omega = omega * log_p.exp()
        floor = 0.02 if self.form == "released" else 1e-30
        alpha = -math.log(max(self.lambda_min, 1e-30))
        weight = (-alpha * omega / step.max(omega).clamp_min(floor)).exp().clamp(self.lambda_min, 1.0)
        return TokenWeights((weight * advantages).float())


@dataclass(frozen=True)
class ClipB(TokenWeighting):
    """Clip_B: tokens with A < 0 and S_y - mean S < -mu std S leave the loss.

    The paper's theorem bounds S on both sides; this is the authors' released one-sided rule, where
    the dropped tokens leave the denominator too.

    Attributes:
        mu: standard deviations below the mean; a larger mu drops fewer tokens.
    """

    mu: float = number(2.5, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages, sampled = step.token_advantages(), sampled_part(step)
        std = step.std(sampled)
        dropped = (advantages < 0) & (sampled - step.mean(sampled) < -self.mu * std) & (std >= _FLAT)
        return TokenWeights(advantages, keep=~dropped)


@dataclass(frozen=True)
class ClipV(TokenWeighting):
    """Clip_V: tokens with A < 0 and B - S_y > mu std(B - S), largest first, leave the loss.

    E_y[B - S_y] = 0, so the threshold is not centred; the standard deviation is about the batch's
    mean, and the dropped tokens leave the denominator too, as released.

    Attributes:
        mu: standard deviations; a larger mu drops fewer tokens.
        max_share: at most this share of all valid tokens is dropped, at least one token.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    mu: float = number(8.5, 0)
    max_share: float = number(1e-4, 0, 1)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        excess = expected_part(step) - sampled_part(step)
        std = step.std(excess)
        over = (advantages < 0) & (excess > self.mu * std) & (std >= _FLAT)
        return TokenWeights(advantages, keep=~step.top(excess, step.share(self.max_share), over))


@dataclass(frozen=True)
class PapoLike(TokenWeighting):
    """w_t = 1 - gain clamp(trend / width, -1, 1) sign(P_t), polarity P_t = A_t (B_t - S_t).

    P > 0 expands the entropy to first order, P < 0 contracts it. The paper (abstract only) names
    the polarity, a reweighting of its two branches and the entropy's trajectory as the signal. How
    the weights depend on it is our proposal.

    Attributes:
        gain: largest distance of the weights from 1, in [0, 1].
        width: relative deviation of the entropy from its moving average at which that distance is
            reached.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    state: ClassVar[frozenset[str]] = frozenset({"trend"})
    gain: float = number(0.5, 0, 1)
    width: float = number(0.05, positive=True)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        polarity = advantages * (expected_part(step) - sampled_part(step))
        rising = (step.state["trend"] / self.width).clamp(-1, 1)
        return TokenWeights((1 - self.gain * rising * polarity.sign()) * advantages)


METHODS = (
    Method("steer", EAPOConfig(clip_high=0.28, dual_clip=10.0), token_weighting=Steer(), source="2510.10150",
        summary="Tokens with a large predicted entropy change get a smaller weight.",
        formula="w_t = exp(ln(lambda_min) |Omega_t| / max |Omega|), Omega_t = A_t p_t (1 - p_t)(log p_t + H_t)"),
    Method("clip_b", EAPOConfig(), token_weighting=ClipB(), source="2602.03392",
        summary="Drops tokens of wrong responses with moderately low probability: they would contract the entropy most.",
        formula="without tokens where A_t < 0 and S_t - mean S < -mu std S, S = p (log p + H)"),
    Method("clip_v", EAPOConfig(), token_weighting=ClipV(), source="2602.03392",
        summary="As Clip_B, with S measured against its expectation over the vocabulary.",
        formula="without tokens where A_t < 0 and B_t - S_t > mu std(B - S), at most 1e-4 of them, B = sum p^2 (log p + H)"),
    Method("papo_like", EAPOConfig(clip_high=0.28), controller="entropy_trend", token_weighting=PapoLike(),
        source="2605.11775", confidence="low",
        summary="Weights up tokens that expand the entropy while it falls, and tokens that contract it while it rises.",
        formula="w_t = 1 - gain clamp(trend / width, -1, 1) sign(A_t (B_t - S_t)), trend = H_k / moving average - 1"),
)  # fmt: skip
