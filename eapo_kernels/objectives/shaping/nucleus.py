"""SIREN: the entropy of the nucleus at each response's peaks is held at its first value (arXiv 2509.25133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class Siren(TokenWeighting):
    """beta (Hbar - Hanchor)^2, Hbar the mean over responses of the mean nucleus entropy over the response's peaks.

    Peaks: the tokens above the response's own quantile of the nucleus entropy. The gradient is that of
    2 beta (Hbar - Hanchor) Hbar with the first factor taken at the old policy, so the bonus's coefficient is
    c_t = -2 beta (Hbar - Hanchor) / (responses * peaks of the response) on peaks, divided by the loss's own scale of a token.
    Wants ``entropy_top_p`` in the config, so that the bonus is on the nucleus entropy too.

    Attributes:
        beta: loss per squared nat.
        peak_quantile: in [0, 1); 0.8 keeps a fifth of the tokens.
    """

    scope: ClassVar[str] = "batch"
    needs: ClassVar[frozenset[str]] = frozenset({"nucleus_entropy"})
    state: ClassVar[frozenset[str]] = frozenset({"anchor"})
    beta: float = 5e-3
    peak_quantile: float = 0.8

    def __post_init__(self) -> None:
        require_number("beta", self.beta, 0)
        require_number("peak_quantile", self.peak_quantile, 0, 1)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        share, mean = self._peaks(step_stats)
        pull = -2 * self.beta * (mean - step_stats.state["anchor"])
        coefficient = pull * share / torch.where(step_stats.valid, step_stats.scale.double(), 1.0)
        return TokenWeights(step_stats.token_advantages(), entropy_coef=coefficient)

    def observed(self, step_stats: StepStats) -> tuple[Tensor, Tensor]:
        """Hbar times the number of responses, and that number."""
        responses = (step_stats.lengths() > 0).sum().double()
        return self._peaks(step_stats)[1] * responses, responses

    def _peaks(self, step_stats: StepStats) -> tuple[Tensor, Tensor]:
        """[N] fp64 what a token adds to Hbar per nat, and Hbar (0-dim fp64); a response without a peak adds zero."""
        assert step_stats.nucleus_entropy is not None
        values = step_stats.nucleus_entropy.double()
        peak = step_stats.valid & (values > step_stats.by_sequence().quantile(values, self.peak_quantile))
        responses = (step_stats.lengths() > 0).sum().clamp_min(1)
        share = torch.where(peak, 1 / (step_stats.by_sequence(peak).counts.clamp_min(1) * responses), 0.0)
        return share, (share * values).sum()


METHODS = (
    Method(
        "siren",
        EAPOConfig(advantage="group_mean", reduction="fixed_length", clip_low=0.28, clip_high=0.28, entropy_top_p=0.8),
        controller="anchor",
        token_weighting=Siren(),
        source="2509.25133",
        summary="The nucleus entropy at each response's most uncertain tokens is drawn back to what it was at the first step.",
        formula="+ beta (Hbar - Hbar_1)^2, Hbar = mean over responses of the mean nucleus entropy of its top 20 % tokens",
    ),
)
