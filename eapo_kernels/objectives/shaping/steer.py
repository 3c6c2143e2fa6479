"""STEER: tokens that are predicted to change the entropy much count less (arXiv 2510.10150)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...checks import require_choice, require_number
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class Steer(TokenWeighting):
    """w_t = exp(-alpha |Omega_t| / max |Omega|), alpha = -ln(lambda_min), Omega_t = A_t p_t (1 - p_t)(log p_t + H_t).

    Omega is the first-order entropy change when the token's own logit alone moves. The theorem's factor rho is 1 at the old
    policy, where the weights are fixed.

    Attributes:
        lambda_min: the smallest weight, in (0, 1].
        form: "theorem"; or "released": the authors' code, with A / p_t instead of A, the maximum at least 0.02, and the weight
            clamped to [lambda_min, 1].
    """

    scope: ClassVar[str] = "batch"
    lambda_min: float = 0.8
    form: str = "theorem"

    def __post_init__(self) -> None:
        require_number("lambda_min", self.lambda_min, 0, 1)
        require_choice("form", self.form, ("theorem", "released"))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        log_p = step_stats.logp.double()
        omega = (advantages * -log_p.expm1() * (log_p + step_stats.entropy)).abs()
        if self.form == "theorem":
            omega = omega * log_p.exp()
        floor = 0.02 if self.form == "released" else 1e-30
        alpha = -math.log(max(self.lambda_min, 1e-30))
        weight = (-alpha * omega / step_stats.largest(omega).clamp_min(floor)).exp().clamp(self.lambda_min, 1.0)
        return TokenWeights((weight * advantages).float())


METHODS = (
    Method(
        "steer",
        EAPOConfig(clip_high=0.28, dual_clip=10.0),
        token_weighting=Steer(),
        source="2510.10150",
        summary="Tokens that are predicted to change the entropy much count less.",
        formula="w_t = exp(ln(lambda_min) |Omega_t| / max |Omega|), Omega_t = A_t p_t (1 - p_t)(log p_t + H_t)",
    ),
)
