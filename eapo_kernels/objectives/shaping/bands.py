"""Entropy gradients that draw tokens back into a band (EPO, SPINE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_choice, require_number
from ...errors import require
from ..config import EAPOConfig
from ..grouping import Partition
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


def outside(entropy: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """[N] fp64 indicators of H < low and H > high: minus the derivative, and the derivative, of the hinges by H."""
    return (entropy < low).double(), (entropy > high).double()


@dataclass(frozen=True)
class Epo(TokenWeighting):
    """Bonus coef (H_t - slope (relu(low Hbar - H_t) + relu(H_t - high Hbar))), Hbar the mean entropy of the steps so far.

    The paper's penalty is a constant outside the band: its gradient is zero, so that in the authors' code only the bonus acts.
    ``form="released"`` is that. The default makes the penalty a hinge, whose gradient draws tokens back; its slope is ours: 2
    turns the bonus around above the band. Bounds and indicators are the old policy's.

    Attributes:
        coef: factor of the bonus (loss per nat).
        low, high: the band, in units of Hbar.
        slope: of the hinge.
        form: "hinge" or "released".
        schedule: multiplies the penalty: "constant"; or "phases", the authors' weight: slowly from 1 to 0.83 in the first half
            of the training, then 0.8 falling fast.
    """

    scope: ClassVar[str] = "token"
    state: ClassVar[frozenset[str]] = frozenset({"history"})
    coef: float = 1e-3
    low: float = 0.8
    high: float = 1.2
    slope: float = 2.0
    form: str = "hinge"
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for name in ("coef", "low", "slope"):
            require_number(name, getattr(self, name), 0)
        require_number("high", self.high, self.low)
        require_choice("form", self.form, ("hinge", "released"))
        require_choice("schedule", self.schedule, ("constant", "phases"))

    def weight(self, progress: float) -> float:
        """The penalty's factor at this share of the training."""
        if self.schedule == "constant":
            return 1.0
        if progress <= 0.5:
            return 1 - 0.2 * (1 - math.exp(-4 * progress))
        return 0.8 * math.exp(-3 * (2 * progress - 1))

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        history = step_stats.state["history"]
        below, above = outside(step_stats.entropy.double(), self.low * history, self.high * history)
        slope = 0.0 if self.form == "released" else self.slope * self.weight(step_stats.progress)
        return TokenWeights(step_stats.token_advantages(), entropy_coef=self.coef * (1 + slope * (below - above)))


@dataclass(frozen=True)
class Spine(TokenWeighting):
    """Only forks, tokens of high entropy, are learned from; hinges draw their entropy into a band.

        + beta_low relu(low - H_t) + beta_high relu(H_t - high)    on forks

    The paper's full-vocabulary KL to the reference on forks is here the config's per-token estimate (``kl_coef``; k3), which
    the narrowed mask restricts to forks. The factors beta are not known to us. Rewards: ``majority_rewards``.

    Attributes:
        fork: "otsu", forks above Otsu's threshold of the batch's entropies in 100 bins, band [median - 1.4826 MAD, median] of
            the forks' entropies (second version of the paper); or "top", the ``share`` of highest entropy in the batch, band
            from the 10 to the 50 % quantile of each response's forks (first version).
        share: for "top".
        beta_low, beta_high: slopes of the hinges (loss per nat).
    """

    scope: ClassVar[str] = "batch"
    fork: str = "otsu"
    share: float = 0.2
    beta_low: float = 1e-2
    beta_high: float = 1e-2

    def __post_init__(self) -> None:
        require_choice("fork", self.fork, ("otsu", "top"))
        for name in ("share", "beta_low", "beta_high"):
            require_number(name, getattr(self, name), 0)
        require(0 < self.share <= 1, "share", "a number in (0, 1]", self.share)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        entropy = step_stats.entropy.double()
        if self.fork == "otsu":
            forks = step_stats.valid & (entropy > otsu_threshold(step_stats))
            together = Partition(torch.zeros_like(step_stats.sequence_ids), forks)
            high = together.quantile(entropy, 0.5)
            low = high - 1.4826 * together.quantile((entropy - high).abs(), 0.5)
        else:
            together = Partition(torch.zeros_like(step_stats.sequence_ids), step_stats.valid)
            forks = step_stats.valid & (entropy >= together.quantile(entropy, 1 - self.share))
            own = step_stats.by_sequence(forks)
            low, high = own.quantile(entropy, 0.1), own.quantile(entropy, 0.5)
        below, above = outside(entropy, low, high)
        coefficient = torch.where(forks, self.beta_low * below - self.beta_high * above, 0.0)
        return TokenWeights(step_stats.token_advantages(), entropy_coef=coefficient, keep=forks)


def otsu_threshold(step_stats: StepStats, bins: int = 100) -> Tensor:
    """0-dim fp64 (nats): the bin edge that parts the entropies with the largest variance between the parts (Otsu 1979).

    inf where all entropies are equal: nothing lies above.
    """
    low, high = step_stats.smallest(step_stats.entropy).double(), step_stats.largest(step_stats.entropy).double()
    width = (high - low) / bins
    place = ((step_stats.entropy - low) / width.clamp_min(1e-30)).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.float64, device=place.device).index_add_(0, place, step_stats.valid.double())
    weight = counts / counts.sum().clamp_min(1)
    centres = torch.arange(bins, dtype=torch.float64, device=place.device) + 0.5
    mass, moment = weight.cumsum(0), (weight * centres).cumsum(0)
    between = (moment[-1] * mass - moment).square() / (mass * (1 - mass)).clamp_min(1e-30)
    between = torch.where((mass > 0) & (mass < 1 - 1e-12), between, -1.0)
    edge = low + (between.argmax() + 1) * width
    return torch.where((width > 0) & edge.isfinite(), edge, float("inf"))


METHODS = (
    Method(
        "epo",
        EAPOConfig(),
        controller="entropy_history",
        token_weighting=Epo(),
        source="2509.22576",
        summary="Entropy bonus, and a band around the mean entropy of the past that tokens are drawn back into.",
        formula="c_t = coef (1 + slope ([H_t < 0.8 Hbar] - [H_t > 1.2 Hbar])), Hbar = mean over the steps so far",
    ),
    Method(
        "spine",
        EAPOConfig(reduction="seq_mean_token_mean"),
        token_weighting=Spine(),
        source="2511.17938",
        summary="Only tokens where the answer forks are learned from, and their entropy is kept in a band.",
        formula="mask = H > Otsu; c_t = b_low [H < low] - b_high [H > high], band = [median - 1.4826 MAD, median] of forks",
        confidence="medium",
    ),
)
