"""Weights from the covariance of advantage and log-prob.

Large values mark the tokens that lower the entropy. Source: arXiv 2505.22617.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import require_number
from ..config import EAPOConfig
from .step import Method, StepStats, TokenWeighting, TokenWeights, number


def token_covariance(step: StepStats, advantages: Tensor) -> Tensor:
    """[N] fp64 (A_t - mean A)(log p_t - mean log p) over the valid tokens; 0 at the others."""
    centred = (advantages - step.mean(advantages)) * (step.logp - step.mean(step.logp))
    return torch.where(step.valid, centred, 0.0)


@dataclass(frozen=True)
class ClipCov(TokenWeighting):
    """Clip-Cov: a random few of the tokens whose covariance lies in (low, high) get no gradient.

    The authors leave out tokens that the ratio clip has removed already. At the old policy, where
    the weights are fixed, the ratio is 1 and there are none.

    Attributes:
        ratio: share of all valid tokens to drop; at least one is dropped when there is a candidate.
        low, high: bounds of the covariance.
    """

    ratio: float = number(2e-4, 0, 1)
    low: float = number(1.0)
    high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("high", self.high, self.low)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        return TokenWeights(torch.where(self.dropped(step, advantages), 0.0, advantages))

    def dropped(self, step: StepStats, advantages: Tensor) -> Tensor:
        """[N] bool: the tokens that are drawn. Means and the share are over ``step.valid``."""
        covariance = token_covariance(step, advantages)
        candidates = (covariance > self.low) & (covariance < self.high)
        return step.top(step.uniform(), step.share(self.ratio), candidates)


@dataclass(frozen=True)
class KlCov(TokenWeighting):
    """KL-Cov: penalty beta * |log(pi / pi_old)| on the tokens of largest covariance.

    With surrogate "unclipped".

    Attributes:
        ratio: share of all valid tokens, at least one token (the authors' 0.2 percent; 0.02 percent
            at 32B; verl 2e-4).
        beta: factor of the penalty (the authors' 1; verl's configuration 0.1).
    """

    ratio: float = number(2e-3, 0, 1)
    beta: float = number(1.0, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        chosen = step.top(token_covariance(step, advantages), step.share(self.ratio))
        return TokenWeights(advantages, ratio_penalty=self.beta * chosen.float())


@dataclass(frozen=True)
class TeaRl(TokenWeighting):
    """TEA-RL: entropy bonus clamp(scale softmax_t(cov_t), 0, most), softmax in the response.

    In the authors' loop the covariance carries gradient, and the released code overwrites this loss
    before it is used. Here the coefficient is a constant, like every token weight.

    Attributes:
        scale: factor on the softmax.
        most: upper bound of the coefficient (loss per nat).
    """

    scale: float = number(10.0, positive=True)
    most: float = number(5.0, 0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        covariance, responses = token_covariance(step, advantages), step.by_sequence()
        raised = torch.where(step.valid, (covariance - responses.max(covariance)).exp(), 0.0)
        share = raised / responses.sum(raised).clamp_min(1e-30)
        return TokenWeights(advantages, entropy_coef=(self.scale * share).clamp_max(self.most))


@dataclass(frozen=True)
class Spear(TokenWeighting):
    """L = mean over fresh tokens + ramp * mean over replayed tokens, both with Clip-Cov.

    ramp = coef (1 - cos(pi u / full_at)) / 2 up to u = full_at, coef afterwards; u is the share of
    the training that is done. Both means use the config's reduction with the counts of the whole
    step: the weight of a part is the whole step's sum of scales over the part's. Replayed tokens of
    advantage <= 0 are not imitated. The buffer, and the advantages of its responses against the
    running median reward, belong to the trainer: pass the advantages of all responses in
    ``batch.advantages``.

    Source: arXiv 2509.22601; Clip-Cov on fresh tokens is in its released code and script.

    Attributes:
        coef: the last weight of the replayed part.
        full_at: share of the training after which it is reached, in (0, 1] (the authors: 100 or 200
            steps).
        ratio, low, high: of Clip-Cov on replayed tokens (see ``ClipCov``).
        fresh_ratio, fresh_low, fresh_high: of Clip-Cov on fresh tokens; equal bounds: none.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"replayed"})
    coef: float = number(1.0, 0)
    full_at: float = number(0.5, 0, 1, positive=True)
    ratio: float = 0.02
    low: float = 2.0
    high: float = 60.0
    fresh_ratio: float = number(2e-4, 0, 1)
    fresh_low: float = number(1.0)
    fresh_high: float = number(5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ClipCov(self.ratio, self.low, self.high)
        require_number("fresh_high", self.fresh_high, self.fresh_low)

    def ramp(self, progress: float) -> float:
        """Weight of the replayed part at this share of the training."""
        return self.coef * 0.5 * (1 - math.cos(math.pi * min(progress / self.full_at, 1.0)))

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        replayed = step.valid & (torch.zeros_like(step.valid) if step.replayed is None else step.replayed)
        fresh = step.valid & ~replayed
        for part, rule in (
            (replayed, ClipCov(self.ratio, self.low, self.high)),
            (fresh, ClipCov(self.fresh_ratio, self.fresh_low, self.fresh_high)),
        ):
            dropped = rule.dropped(replace(step, valid=part), advantages)
            advantages = torch.where(dropped, 0.0, advantages)
        scale = torch.where(step.valid, step.scale.double(), 0.0)

        def part_weight(part: Tensor) -> Tensor:
            return scale.sum() / torch.where(part, scale, 0.0).sum().clamp_min(1e-30)

        replay = self.ramp(step.progress) * part_weight(replayed) * advantages.clamp_min(0)
        return TokenWeights(torch.where(replayed, replay, part_weight(fresh) * advantages))


METHODS = (
    Method("clip_cov", EAPOConfig(clip_low=1.0, clip_high=1.0), token_weighting=ClipCov(), source="2505.22617",
        summary="A few of the tokens with a high covariance of advantage and log-prob get no gradient.",
        formula="w_t = 0 on a random 2e-4 of the tokens with 1 < (A_t - mean A)(log p_t - mean log p) < 5"),
    Method("kl_cov", EAPOConfig(surrogate="unclipped"), token_weighting=KlCov(), source="2505.22617",
        summary="A penalty keeps the tokens with the highest covariance of advantage and log-prob near the old policy.",
        formula="+ beta |log rho_t| on the 0.2 % of the tokens with the largest covariance"),
    Method("tea_rl", EAPOConfig(), token_weighting=TeaRl(), source="2508.03178", confidence="medium",
        summary="An entropy bonus that grows with the token's covariance of advantage and log-prob.",
        formula="c_t = clamp(10 softmax_t(cov_t), 0, 5), cov as in clip_cov"),
    Method("spear", EAPOConfig(), token_weighting=Spear(), source="2509.22601",
        summary="The clipped loss plus imitation of replayed good responses, faded in, with Clip-Cov; the trainer keeps the "
                "buffer.",
        formula="L_fresh + (1 - cos(pi u / u_full)) / 2 L_replay; w_t = 0 on a random 2 % of replayed tokens with 2 < cov < "
                "60, and as clip_cov on fresh ones"),
)  # fmt: skip
