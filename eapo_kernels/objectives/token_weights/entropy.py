"""Weights and bonuses from entropies: of the token, its nucleus, or the step's mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import require, require_number
from ..config import EAPOConfig
from .partition import OrderedPartition
from .step import Method, StepStats, TokenWeighting, TokenWeights, choice, number

_FLAT = 1e-6
"""A standard deviation (nats) below this counts as no spread."""

_LEAST = 1e-8
"""Entropies (nats) below this count as this where their logarithm is taken."""


@dataclass(frozen=True)
class AepoAgentic(TokenWeighting):
    """A_t (1 + strength (H_t - mean H) / std H), over all valid tokens.

    With surrogate "balanced_clip".

    Attributes:
        strength: factor on the z-score of the entropy (population standard deviation).
    """

    strength: float = number(0.2)

    def __call__(self, step: StepStats) -> TokenWeights:
        entropy, std = step.entropy.double(), step.std(step.entropy)
        z = torch.where(std > _FLAT, (entropy - step.mean(entropy)) / std.clamp_min(_FLAT), 0.0)
        return TokenWeights((1 + self.strength * z) * step.token_advantages())


@dataclass(frozen=True)
class Hapo(TokenWeighting):
    """Rewards normalised over the tokens of the group, and an entropy score that moves clip and advantage.

        A_t = (r - mean) / (std + 1e-6), mean and population std over all tokens of the group (eq. 9)
        h_t = x / max x where x > 0, else x / |min x|;  x = log max(H_t, 1e-8) - its ``pivot``-quantile (eqs. 5, 6)

    With surrogate "hapo", which has eqs. 10 to 13. As released, a group in which |A_t| reaches ``most`` gets the
    config's advantages. The released code's h of tokens at low entropy is |h|. Source: arXiv 2509.16591.

    Attributes:
        pivot: share of the tokens that count as having low entropy.
        most: bound of |A_t|; None: no bound.
        form: "paper", or "released".
    """

    pivot: float = number(0.8, 0, 1)
    most: float | None = number(5.0, positive=True)
    form: str = choice("paper", "released")

    def __call__(self, step: StepStats) -> TokenWeights:
        groups = OrderedPartition(step.group_ids[step.sequence_ids], step.valid)
        margin = step.raw_rewards().double()[step.sequence_ids]
        margin = margin - groups.mean(margin)
        advantages = margin / (groups.mean(margin.square()).sqrt() + _FLAT)
        if self.most is not None:
            far = groups.max(advantages.abs()) >= self.most
            advantages = torch.where(far, step.per_token(step.estimate(step.rewards, step.present())), advantages)
        every = OrderedPartition(torch.zeros_like(step.sequence_ids), step.valid)
        x = step.entropy.double().clamp_min(_LEAST).log()
        middle = every.rank(x) == (self.pivot * (every.counts - 1).double()).round()
        x = x - every.sum(torch.where(middle, x, 0.0))
        score = x / torch.where(x > 0, every.max(x), every.max(-x)).clamp_min(_LEAST)
        return TokenWeights(advantages, entropy_score=score.abs() if self.form == "released" else score)


def _outside(entropy: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """[N] fp64 [H < low] and [H > high]: -d relu(low - H) / dH and d relu(H - high) / dH."""
    return (entropy < low).double(), (entropy > high).double()


@dataclass(frozen=True)
class Epo(TokenWeighting):
    """Bonus coef (H_t - slope (relu(low Hbar - H_t) + relu(H_t - high Hbar))).

    Hbar is the mean entropy of the steps so far. The paper's penalty is a constant outside the
    band. Its gradient is zero, so in the authors' code only the bonus acts: ``form="released"``.
    The default replaces the penalty by a hinge, whose gradient moves the entropy back into the
    band. The slope is ours; 2 reverses the bonus above the band. Bounds and indicators are those of
    the old policy.

    Attributes:
        coef: factor of the bonus (loss per nat).
        low, high: the band, in units of Hbar.
        slope: of the hinge.
        form: "hinge" or "released".
        schedule: factor of the penalty: "constant"; or "phases", the authors' weight: it falls
            slowly from 1 to 0.83 in the first half of the training, then fast from 0.8.
    """

    scope: ClassVar[str] = "token"
    state: ClassVar[frozenset[str]] = frozenset({"history"})
    coef: float = number(1e-3, 0)
    low: float = number(0.8, 0)
    high: float = 1.2
    slope: float = number(2.0, 0)
    form: str = choice("hinge", "released")
    schedule: str = choice("constant", "phases")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("high", self.high, self.low)

    def penalty_factor(self, progress: float) -> float:
        """The penalty's factor at this share of the training."""
        if self.schedule == "constant":
            return 1.0
        if progress <= 0.5:
            return 1 - 0.2 * (1 - math.exp(-4 * progress))
        return 0.8 * math.exp(-3 * (2 * progress - 1))

    def __call__(self, step: StepStats) -> TokenWeights:
        history = step.state["history"]
        below, above = _outside(step.entropy.double(), self.low * history, self.high * history)
        slope = 0.0 if self.form == "released" else self.slope * self.penalty_factor(step.progress)
        return TokenWeights(step.token_advantages(), entropy_coef=self.coef * (1 + slope * (below - above)))


@dataclass(frozen=True)
class Spine(TokenWeighting):
    """Only forks, tokens of high entropy, are trained on; hinges move their entropy into a band.

        + beta_low relu(low - H_t) + beta_high relu(H_t - high)    on forks

    The paper's full-vocabulary KL to the reference on forks is here the config's per-token estimate
    (``kl_coef``; k3), which the narrowed mask restricts to forks. The paper's factors beta are not
    known to us. Rewards: ``majority_rewards``.

    Attributes:
        fork: "otsu" (second version of the paper): forks are above Otsu's threshold of the batch's
            entropies in 100 bins, the band is [median - 1.4826 MAD, median] of the forks'
            entropies; or "top" (first version): forks are the ``share`` of highest entropy in the
            batch, the band is from the 10 to the 50 % quantile of each response's forks.
        share: for "top".
        beta_low, beta_high: slopes of the hinges (loss per nat).
    """

    fork: str = choice("otsu", "top")
    share: float = number(0.2, 0, 1, positive=True)
    beta_low: float = number(1e-2, 0)
    beta_high: float = number(1e-2, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        entropy, one_class = step.entropy.double(), torch.zeros_like(step.sequence_ids)
        if self.fork == "otsu":
            forks = step.valid & (entropy > otsu_threshold(step))
            together = OrderedPartition(one_class, forks)
            high = together.quantile(entropy, 0.5)
            low = high - 1.4826 * together.quantile((entropy - high).abs(), 0.5)
        else:
            forks = step.valid & (entropy >= OrderedPartition(one_class, step.valid).quantile(entropy, 1 - self.share))
            own = step.by_sequence(forks)
            low, high = own.quantile(entropy, 0.1), own.quantile(entropy, 0.5)
        below, above = _outside(entropy, low, high)
        coefficient = torch.where(forks, self.beta_low * below - self.beta_high * above, 0.0)
        return TokenWeights(step.token_advantages(), entropy_coef=coefficient, keep=forks)


def otsu_threshold(step: StepStats, bins: int = 100) -> Tensor:
    """0-dim fp64 (nats): the bin edge with the largest variance between its two sides.

    inf where all entropies are equal: no entropy is above it. Source: Otsu 1979.
    """
    low, high = step.min(step.entropy).double(), step.max(step.entropy).double()
    width = (high - low) / bins
    index = ((step.entropy - low) / width.clamp_min(1e-30)).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.float64, device=index.device).index_add_(0, index, step.valid.double())
    weight = counts / counts.sum().clamp_min(1)
    centres = torch.arange(bins, dtype=torch.float64, device=index.device) + 0.5
    mass, moment = weight.cumsum(0), (weight * centres).cumsum(0)
    between = (moment[-1] * mass - moment).square() / (mass * (1 - mass)).clamp_min(1e-30)
    between = torch.where((mass > 0) & (mass < 1 - 1e-12), between, -1.0)
    edge = low + (between.argmax() + 1) * width
    return torch.where((width > 0) & edge.isfinite(), edge, float("inf"))


@dataclass(frozen=True)
class Siren(TokenWeighting):
    """beta (Hbar - Hanchor)^2, Hbar the mean nucleus entropy at the responses' peaks.

    Hbar is the mean over responses of the mean over the response's peaks: the tokens above the
    response's own quantile of the nucleus entropy. The gradient is that of 2 beta (Hbar - Hanchor)
    Hbar with the first factor taken at the old policy. The bonus's coefficient on peaks is c_t = -2
    beta (Hbar - Hanchor) / (responses * peaks of the response), divided by the loss's own scale of
    a token. Needs ``entropy_top_p`` in the config, so that the bonus is on the nucleus entropy too.
    Source: arXiv 2509.25133.

    Attributes:
        beta: loss per squared nat.
        peak_quantile: in [0, 1); 0.8 makes a fifth of the tokens peaks.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"nucleus_entropy"})
    state: ClassVar[frozenset[str]] = frozenset({"anchor"})
    beta: float = number(5e-3, 0)
    peak_quantile: float = number(0.8, 0, 1)

    def __call__(self, step: StepStats) -> TokenWeights:
        share, mean = self._peaks(step)
        pull = -2 * self.beta * (mean - step.state["anchor"])
        coefficient = pull * share / torch.where(step.valid, step.scale.double(), 1.0)
        return TokenWeights(step.token_advantages(), entropy_coef=coefficient)

    def observed(self, step: StepStats) -> tuple[Tensor, Tensor]:
        """Hbar times the number of responses, and that number."""
        responses = (step.lengths() > 0).sum().double()
        return self._peaks(step)[1] * responses, responses

    def _peaks(self, step: StepStats) -> tuple[Tensor, Tensor]:
        """[N] fp64 dHbar / dH_t, and Hbar (0-dim fp64); a response without a peak adds zero."""
        assert step.nucleus_entropy is not None
        values = step.nucleus_entropy.double()
        peak = step.valid & (values > step.by_sequence().quantile(values, self.peak_quantile))
        responses = (step.lengths() > 0).sum().clamp_min(1)
        share = torch.where(peak, 1 / (step.by_sequence(peak).counts * responses).double(), 0.0)
        return share, (share * values).sum()


@dataclass(frozen=True)
class Entropic(TokenWeighting):
    """(1 + alpha) A where A > 0, (1 - alpha) A where A < 0, alpha the controller's.

    alpha is positive while the entropy is above its target.

    Attributes:
        bound: alpha is clamped to [-bound, bound]; 1 keeps both weights from turning negative.
            None, as in the code: no bound.
    """

    state: ClassVar[frozenset[str]] = frozenset({"alpha"})
    bound: float | None = number(None, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages, alpha = step.token_advantages(), step.state["alpha"]
        if self.bound is not None:
            alpha = alpha.clamp(-self.bound, self.bound)
        return TokenWeights((1 + alpha * advantages.sign()) * advantages)


@dataclass(frozen=True)
class Entrocraft(TokenWeighting):
    """Above the band only responses with A >= 0 are kept, below it only those with A <= 0.

    The band is one of the step's mean entropy. Inside it all responses are kept; the others leave
    the batch. The band moves from its first to its last bounds over the training.
    ``form="released"`` is the authors' code: outside the band the advantage is the raw reward
    (which must be signed), max(r, 0) above and min(r, 0) below, and no response leaves the batch.

    Attributes:
        low_first, low_last, high_first, high_last: bounds of the mean entropy (nats) at the start
            and end.
        schedule: "linear" or "cosine".
        form: "paper" or "released".
    """

    low_first: float = number(0.6, 0)
    low_last: float = number(0.4, 0)
    high_first: float = number(0.7, 0)
    high_last: float = number(0.5, 0)
    schedule: str = choice("linear", "cosine")
    form: str = choice("paper", "released")

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = self.low_first <= self.high_first and self.low_last <= self.high_last
        bounds = (self.low_first, self.high_first, self.low_last, self.high_last)
        require(ordered, "low_first, high_first, low_last, high_last", "each low <= its high", bounds)

    def band(self, progress: float) -> tuple[float, float]:
        """(low, high) in nats at this share of the training."""
        done = progress if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        low = self.low_first + (self.low_last - self.low_first) * done
        return low, self.high_first + (self.high_last - self.high_first) * done

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages, entropy = step.token_advantages(), step.mean(step.entropy)
        low, high = self.band(step.progress)
        above, below = entropy > high, entropy < low
        if self.form == "paper":
            side = above.float() - below.float()
            return TokenWeights(advantages, keep=side * advantages >= 0)
        raw = step.per_token(step.rewards.float())
        outside = torch.where(above, raw.clamp_min(0), raw.clamp_max(0))
        return TokenWeights(torch.where(above | below, outside, advantages))


METHODS = (
    Method("aepo_agentic", EAPOConfig(surrogate="balanced_clip", clip_high=0.28, dual_clip=3.0),
        token_weighting=AepoAgentic(), source="2510.14545", confidence="medium",
        summary="Tokens of high entropy get a larger weight, positive tokens far above the old policy keep a bounded "
                "gradient; the trainer branches the rollouts.",
        formula="A_t (1 + 0.2 (H_t - mean H) / std H); A > 0 and rho > 1 + eps: (1 + eps) rho / sg(rho) A"),
    Method("hapo", EAPOConfig(surrogate="hapo", clip_high=0.28, dual_clip=10.0), token_weighting=Hapo(), source="2509.16591",
        summary="Tokens of high entropy may rise further and count more once they move, tokens of low entropy may fall further "
                "and count less until they move; the trainer samples at a temperature for each token.",
        formula="h = log H_t - its 80 % quantile, scaled to [-1, 1]; clip_high (1 + h) and A (1 + h) outside half the clip "
                "where h > 0; clip_low (1 - h) and A (1 + h) inside it where h <= 0; A = r normalised over the group's tokens"),
    Method("epo", EAPOConfig(), controller="entropy_history", token_weighting=Epo(), source="2509.22576",
        summary="An entropy bonus, and a band around the mean entropy of the past into which hinges move the tokens.",
        formula="c_t = coef (1 + slope ([H_t < 0.8 Hbar] - [H_t > 1.2 Hbar])), Hbar = mean over the steps so far"),
    Method("spine", EAPOConfig(reduction="seq_mean_token_mean"), token_weighting=Spine(), source="2511.17938",
        confidence="medium",
        summary="Trains only on forks, tokens of high entropy, and keeps their entropy in a band.",
        formula="mask = H > Otsu; c_t = b_low [H < low] - b_high [H > high], band = [median - 1.4826 MAD, median] of forks"),
    Method("siren",
        EAPOConfig(advantage="group_mean", reduction="fixed_length", clip_low=0.28, clip_high=0.28, entropy_top_p=0.8),
        controller="anchor", token_weighting=Siren(), source="2509.25133",
        summary="Holds the nucleus entropy at each response's tokens of highest entropy at its value of the first step.",
        formula="+ beta (Hbar - Hbar_1)^2, Hbar = mean over responses of the mean nucleus entropy of its top 20 % tokens"),
    Method("entropic", EAPOConfig(), controller="proportional_integral", token_weighting=Entropic(),
        source="EntroPIC, as re-implemented beside 2604.26326",
        summary="A proportional-integral controller weighs positives against negatives to hold the entropy at a set point.",
        formula="w = 1 + alpha where A > 0, 1 - alpha where A < 0; alpha_k = kp (H_k - H*) + ki sum_{j<k} (H_j - H*)"),
    Method("entrocraft", EAPOConfig(), token_weighting=Entrocraft(), source="2604.26326",
        summary="Where the entropy leaves a moving band, drops the responses that would drive it further away.",
        formula="keep i where m A_i >= 0, m = [H > high(u)] - [H < low(u)]"),
)  # fmt: skip
