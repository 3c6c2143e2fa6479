"""Later tokens count more (arXiv 2508.02260)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_number
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class ExchangePosition(TokenWeighting):
    """A_t + sign(A_t) min(alpha sigmoid(steepness (t / length - 0.5)), 0.5 |A_t|), t = 0, 1, ... inside the response.

    Attributes:
        alpha: the largest bonus (0.1 in the authors' script, 0.05 in a saved run).
        steepness: of the sigmoid.
    """

    scope: ClassVar[str] = "sequence"
    alpha: float = 0.1
    steepness: float = 15.0

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, 0)
        require_number("steepness", self.steepness, 0)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        place = step_stats.positions() / step_stats.per_token(step_stats.lengths()).clamp_min(1)
        bonus = torch.minimum(self.alpha * (self.steepness * (place - 0.5)).sigmoid(), 0.5 * advantages.abs())
        return TokenWeights(advantages + advantages.sign() * bonus)


METHODS = (
    Method(
        "exchange_position",
        EAPOConfig(),
        token_weighting=ExchangePosition(),
        source="2508.02260",
        summary="A bonus in the direction of the advantage for tokens towards the end of a response.",
        formula="A + sign(A) min(0.1 sigmoid(15 (t / length - 0.5)), 0.5 |A|)",
    ),
)
