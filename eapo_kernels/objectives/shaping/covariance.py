"""Weights from the covariance of advantage and log-prob: the tokens that drive entropy down (arXiv 2505.22617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from .evidence import Evidence, Shaped
from .shaper import Shaper


def token_covariance(evidence: Evidence, advantages: Tensor) -> Tensor:
    """[N] fp64 (A_t - mean A)(log p_t - mean log p), means over all valid tokens; 0 at the others."""
    centred = (advantages - evidence.mean(advantages)) * (evidence.logp - evidence.mean(evidence.logp))
    return torch.where(evidence.valid, centred, 0.0)


def largest(values: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """[N] bool: the ``count`` largest of ``values`` where ``among``; ties go to the earlier token."""
    ordered = torch.where(among, values, float("-inf")).argsort(descending=True, stable=True)
    rank = torch.empty_like(ordered).scatter_(0, ordered, torch.arange(ordered.numel(), device=ordered.device))
    return among & (rank < count)


@dataclass(frozen=True)
class ClipCov(Shaper):
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

    def __call__(self, evidence: Evidence) -> Shaped:
        advantages = evidence.per_token(evidence.advantages())
        covariance = token_covariance(evidence, advantages)
        candidates = evidence.valid & (covariance > self.low) & (covariance < self.high)
        count = (self.ratio * evidence.valid.sum().double()).long().clamp_min(1)
        dropped = largest(evidence.uniform(), candidates, count)
        return Shaped(torch.where(dropped, 0.0, advantages))


@dataclass(frozen=True)
class KlCov(Shaper):
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

    def __call__(self, evidence: Evidence) -> Shaped:
        advantages = evidence.per_token(evidence.advantages())
        count = (self.ratio * evidence.valid.sum().double()).long().clamp_min(1)
        chosen = largest(token_covariance(evidence, advantages), evidence.valid, count)
        return Shaped(advantages, ratio_penalty=self.beta * chosen.float())
