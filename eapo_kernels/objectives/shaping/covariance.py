"""Weights from the covariance of advantage and log-prob: the tokens that drive entropy down (arXiv 2505.22617)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from ...errors import require
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


def token_covariance(step_stats: StepStats, advantages: Tensor) -> Tensor:
    """[N] fp64 (A_t - mean A)(log p_t - mean log p), means over all valid tokens; 0 at the others."""
    centred = (advantages - step_stats.mean(advantages)) * (step_stats.logp - step_stats.mean(step_stats.logp))
    return torch.where(step_stats.valid, centred, 0.0)


def largest(values: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """[N] bool: the ``count`` largest of ``values`` where ``among``; ties go to the earlier token."""
    ordered = torch.where(among, values, float("-inf")).argsort(descending=True, stable=True)
    rank = torch.empty_like(ordered).scatter_(0, ordered, torch.arange(ordered.numel(), device=ordered.device))
    return among & (rank < count)


@dataclass(frozen=True)
class ClipCov(TokenWeighting):
    """Clip-Cov: of the tokens whose covariance lies in (low, high), a few drawn at random lose their gradient.

    The authors leave out tokens that the ratio clip has removed already; at the old policy, where the weights are fixed, the
    ratio is 1 and there are none.

    Attributes:
        ratio: share of all valid tokens to drop; at least one is dropped when there is a candidate.
        low, high: bounds of the covariance.
    """

    scope: ClassVar[str] = "batch"
    ratio: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        require_number("ratio", self.ratio, 0, 1)
        require_number("low", self.low)
        require_number("high", self.high, self.low)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        dropped = self.dropped(step_stats, advantages, step_stats.valid)
        return TokenWeights(torch.where(dropped, 0.0, advantages))

    def dropped(self, step_stats: StepStats, advantages: Tensor, among: Tensor) -> Tensor:
        """[N] bool: what is drawn of the tokens ``among``, over which the means are taken and the share is counted."""
        chosen = replace(step_stats, valid=step_stats.valid & among)
        covariance = token_covariance(chosen, advantages)
        candidates = chosen.valid & (covariance > self.low) & (covariance < self.high)
        return largest(step_stats.uniform(), candidates, chosen.share(self.ratio).clamp_min(1))


@dataclass(frozen=True)
class KlCov(TokenWeighting):
    """KL-Cov: the tokens of largest covariance pay beta * |log(pi / pi_old)|. With surrogate "unclipped".

    Attributes:
        ratio: share of all valid tokens, at least one of them (the authors' 0.2 percent; 0.02 percent at 32B; verl 2e-4).
        beta: the penalty's factor (the authors' value; verl's configuration has 0.1).
    """

    scope: ClassVar[str] = "batch"
    ratio: float = 2e-3
    beta: float = 1.0

    def __post_init__(self) -> None:
        require_number("ratio", self.ratio, 0, 1)
        require_number("beta", self.beta, 0)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        count = step_stats.share(self.ratio).clamp_min(1)
        chosen = largest(token_covariance(step_stats, advantages), step_stats.valid, count)
        return TokenWeights(advantages, ratio_penalty=self.beta * chosen.float())


@dataclass(frozen=True)
class TeaRl(TokenWeighting):
    """TEA-RL: a token's entropy bonus is clamp(scale softmax_t(cov_t), 0, most), softmax over the tokens of its response.

    The authors' loop leaves the gradient inside the covariance and, as released, overwrites this loss; here it is a constant
    weight, as everywhere.

    Attributes:
        scale: factor on the softmax.
        most: upper bound of the coefficient (loss per nat).
    """

    scope: ClassVar[str] = "batch"
    scale: float = 10.0
    most: float = 5.0

    def __post_init__(self) -> None:
        require_number("scale", self.scale, 0)
        require_number("most", self.most, 0)
        require(self.scale > 0, "scale", "a finite number > 0", self.scale)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        covariance, responses = token_covariance(step_stats, advantages), step_stats.by_sequence()
        raised = torch.where(step_stats.valid, (covariance - responses.max(covariance)).exp(), 0.0)
        share = raised / responses.sum(raised).clamp_min(1e-30)
        return TokenWeights(advantages, entropy_coef=(self.scale * share).clamp_max(self.most))


METHODS = (
    Method(
        "clip_cov",
        EAPOConfig(clip_low=1.0, clip_high=1.0),
        token_weighting=ClipCov(),
        source="2505.22617",
        summary="A few of the tokens with a high covariance of advantage and log-prob lose their gradient.",
        formula="w_t = 0 on a random 2e-4 of the tokens with 1 < (A_t - mean A)(log p_t - mean log p) < 5",
    ),
    Method(
        "kl_cov",
        EAPOConfig(surrogate="unclipped"),
        token_weighting=KlCov(),
        source="2505.22617",
        summary="The tokens with the highest covariance of advantage and log-prob pay for leaving the old policy.",
        formula="+ beta |log rho_t| on the 0.2 % of the tokens with the largest covariance",
    ),
    Method(
        "tea_rl",
        EAPOConfig(),
        token_weighting=TeaRl(),
        source="2508.03178",
        summary="An entropy bonus for the tokens whose advantage and log-prob vary together.",
        formula="c_t = clamp(10 softmax_t(cov_t), 0, 5), cov as in clip_cov",
        confidence="medium",
    ),
)
