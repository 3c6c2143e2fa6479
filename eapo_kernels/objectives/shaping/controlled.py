"""Positives and negatives weighed against each other to keep the entropy at a level or in a band."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_choice, require_number
from ...errors import require
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class Entropic(TokenWeighting):
    """(1 + alpha) A where A > 0, (1 - alpha) A where A < 0: alpha, the controller's, is positive where entropy is too high.

    Attributes:
        bound: alpha is clamped to [-bound, bound]; 1 keeps both weights from turning negative. None, as in the code: no bound.
    """

    scope: ClassVar[str] = "batch"
    state: ClassVar[frozenset[str]] = frozenset({"alpha"})
    bound: float | None = None

    def __post_init__(self) -> None:
        if self.bound is not None:
            require_number("bound", self.bound, 0)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        alpha = step_stats.state["alpha"]
        if self.bound is not None:
            alpha = alpha.clamp(-self.bound, self.bound)
        return TokenWeights((1 + alpha * advantages.sign()) * advantages)


@dataclass(frozen=True)
class Entrocraft(TokenWeighting):
    """Entropy above the band: only responses with A >= 0 are learned from; below it: only those with A <= 0; inside: all.

    The others leave the batch. The band moves from its first to its last bounds over the training. ``form="released"`` is the
    authors' code: outside the band the advantage is the raw reward (which must be signed), max(r, 0) above and min(r, 0) below,
    and nothing leaves the batch.

    Attributes:
        low_first, low_last, high_first, high_last: bounds of the mean entropy (nats) at the start and at the end.
        schedule: "linear" or "cosine".
        form: "paper" or "released".
    """

    scope: ClassVar[str] = "batch"
    low_first: float = 0.6
    low_last: float = 0.4
    high_first: float = 0.7
    high_last: float = 0.5
    schedule: str = "linear"
    form: str = "paper"

    def __post_init__(self) -> None:
        for name in ("low_first", "low_last", "high_first", "high_last"):
            require_number(name, getattr(self, name), 0)
        ordered = self.low_first <= self.high_first and self.low_last <= self.high_last
        bounds = (self.low_first, self.high_first, self.low_last, self.high_last)
        require(ordered, "low_first, high_first, low_last, high_last", "each low <= its high", bounds)
        require_choice("schedule", self.schedule, ("linear", "cosine"))
        require_choice("form", self.form, ("paper", "released"))

    def band(self, progress: float) -> tuple[float, float]:
        """(low, high) in nats at this share of the training."""
        done = progress if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        return (
            self.low_first + (self.low_last - self.low_first) * done,
            self.high_first + (self.high_last - self.high_first) * done,
        )

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages, entropy = step_stats.token_advantages(), step_stats.mean(step_stats.entropy)
        low, high = self.band(step_stats.progress)
        above, below = entropy > high, entropy < low
        if self.form == "paper":
            side = above.float() - below.float()
            return TokenWeights(advantages, keep=side * advantages >= 0)
        raw = step_stats.per_token(step_stats.rewards)
        outside = torch.where(above, raw.clamp_min(0), raw.clamp_max(0))
        return TokenWeights(torch.where(above | below, outside, advantages))


METHODS = (
    Method(
        "entrocraft",
        EAPOConfig(),
        token_weighting=Entrocraft(),
        source="2604.26326",
        summary="Where the entropy leaves a moving band, the responses that would drive it further are left out.",
        formula="keep i where m A_i >= 0, m = [H > high(u)] - [H < low(u)]",
    ),
    Method(
        "entropic",
        EAPOConfig(),
        controller="proportional_integral",
        token_weighting=Entropic(),
        source="EntroPIC, as re-implemented beside 2604.26326",
        summary="A proportional-integral controller weighs positives against negatives to hold the entropy at a set point.",
        formula="w = 1 + alpha where A > 0, 1 - alpha where A < 0; alpha_k = kp (H_k - H*) + ki sum_{j<k} (H_j - H*)",
    ),
)
