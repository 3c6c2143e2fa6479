"""Self-imitation: good responses of earlier steps are learned from again (arXiv 2509.22601)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_number
from ...errors import require
from ..config import EAPOConfig
from ..method import Method
from .covariance import ClipCov
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class Spear(TokenWeighting):
    """L = mean over fresh tokens + ramp * mean over replayed tokens, Clip-Cov on the replayed.

    ramp = coef (1 - cos(pi u / u_full)) / 2 up to u_full, coef afterwards; u is the share of the training that is done. Both
    means are the config's reduction, whose counts are those of the whole: a part's weight is the whole's sum of scales over the
    part's. Replayed tokens of advantage <= 0 are not imitated. The buffer, and the advantages of what is in it (against the
    running median reward), are the trainer's: hand the advantages of all responses in ``batch.advantages``.

    Attributes:
        coef: the last weight of the replayed part.
        full_at: share of the training after which it is reached, in (0, 1] (the authors: 100 or 200 steps).
        ratio, low, high: of Clip-Cov (see ``ClipCov``).
    """

    scope: ClassVar[str] = "batch"
    uses: ClassVar[frozenset[str]] = frozenset({"replayed"})
    coef: float = 1.0
    full_at: float = 0.5
    ratio: float = 0.02
    low: float = 2.0
    high: float = 60.0

    def __post_init__(self) -> None:
        require_number("coef", self.coef, 0)
        require_number("full_at", self.full_at, 0, 1)
        require(self.full_at > 0, "full_at", "a number in (0, 1]", self.full_at)
        ClipCov(self.ratio, self.low, self.high)

    def ramp(self, progress: float) -> float:
        """Weight of the replayed part at this share of the training."""
        return self.coef * 0.5 * (1 - math.cos(math.pi * min(progress / self.full_at, 1.0)))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        if step_stats.replayed is None:
            return TokenWeights(advantages)
        old = step_stats.valid & step_stats.replayed
        dropped = ClipCov(self.ratio, self.low, self.high).dropped(step_stats, advantages, old)
        imitated = torch.where(dropped, 0.0, advantages.clamp_min(0))
        scale = torch.where(step_stats.valid, step_stats.scale.double(), 0.0)
        parts = {part: scale.sum() / torch.where(mask, scale, 0.0).sum().clamp_min(1e-30) for part, mask in
                 (("fresh", step_stats.valid & ~old), ("old", old))}  # fmt: skip
        ramp = self.ramp(step_stats.progress)
        return TokenWeights(torch.where(old, ramp * parts["old"] * imitated, parts["fresh"] * advantages))


METHODS = (
    Method(
        "spear",
        EAPOConfig(),
        token_weighting=Spear(),
        source="2509.22601",
        summary="GRPO plus imitation of good earlier responses, faded in, with Clip-Cov; the buffer is the trainer's.",
        formula="L_fresh + (1 - cos(pi u / u_full)) / 2 L_replay; w_t = 0 on a random 2 % of replayed tokens with 2 < cov < 60",
    ),
)
