"""Later tokens count more (arXiv 2508.02260)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_number
from ..config import EAPOConfig
from ..method import Method
from .evidence import Evidence, Shaped
from .shaper import Shaper


@dataclass(frozen=True)
class ExchangePosition(Shaper):
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

    def __call__(self, evidence: Evidence) -> Shaped:
        advantages = evidence.token_advantages()
        place = evidence.positions() / evidence.per_token(evidence.lengths()).clamp_min(1)
        bonus = torch.minimum(self.alpha * (self.steepness * (place - 0.5)).sigmoid(), 0.5 * advantages.abs())
        return Shaped(advantages + advantages.sign() * bonus)


METHODS = (
    Method(
        "exchange_position",
        EAPOConfig(),
        shaper=ExchangePosition(),
        source="2508.02260",
        summary="A bonus in the direction of the advantage for tokens towards the end of a response.",
        formula="A + sign(A) min(0.1 sigmoid(15 (t / length - 0.5)), 0.5 |A|)",
    ),
)
