"""A target entropy, reached with samples of another temperature (arXiv 2510.08141)."""

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
class Aepo(TokenWeighting):
    """REINFORCE with advantage ``level`` on the marked responses, the config's advantages on the others.

    Marked ("reinforce") are correct responses that the trainer sampled at the controller's temperature and put in the place of
    ordinary ones. Give them group numbers of their own, so that they do not enter the ordinary groups' statistics.

    Attributes:
        level: advantage of the marked responses.
    """

    scope: ClassVar[str] = "sequence"
    uses: ClassVar[frozenset[str]] = frozenset({"reinforce"})
    level: float = 1.0

    def __post_init__(self) -> None:
        require_number("level", self.level)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        advantages = step_stats.token_advantages()
        return TokenWeights(
            advantages if step_stats.reinforce is None else torch.where(step_stats.reinforce, self.level, advantages)
        )


@dataclass(frozen=True)
class Dcpo(TokenWeighting):
    """A_t <- (1 - a) A_t + a [correct] p_T(y_t) / p(y_t): importance weights take the place of AEPO's extra rollouts.

    a = b / (1 + b), b = min(|H* - H|, reach) / share of correct responses. p_T is the policy at the controller's temperature,
    above 1 where the entropy H is at or below H*.

    Attributes:
        reach: largest deviation that counts (nats).
        correct_above: a response is correct when its reward exceeds this.
    """

    scope: ClassVar[str] = "batch"
    needs: ClassVar[frozenset[str]] = frozenset({"tempered_logp"})
    state: ClassVar[frozenset[str]] = frozenset({"target"})
    reach: float = 0.1
    correct_above: float = 0.5

    def __post_init__(self) -> None:
        require_number("reach", self.reach, 0)
        require_number("correct_above", self.correct_above)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        assert step_stats.tempered_logp is not None
        correct = (step_stats.rewards > self.correct_above).double()
        present = (step_stats.lengths() > 0).double()
        share = (correct * present).sum() / present.sum().clamp_min(1)
        distance = (step_stats.state["target"] - step_stats.mean(step_stats.entropy)).abs().clamp_max(self.reach)
        b = torch.where(share > 0, distance / share.clamp_min(1e-12), 0.0)
        a = b / (1 + b)
        factor = (step_stats.tempered_logp.double() - step_stats.logp).exp()
        return TokenWeights((1 - a) * step_stats.token_advantages() + a * step_stats.per_token(correct) * factor)


METHODS = (
    Method(
        "aepo",
        EAPOConfig(),
        controller="target_switch",
        token_weighting=Aepo(),
        source="2510.08141",
        summary="REINFORCE on correct answers sampled hotter (entropy at or below target) or cooler replaces some of GRPO's.",
        formula="A = 1 on the marked responses, else GRPO's; temperature 1.2 where H <= H*, else 0.8",
    ),
    Method(
        "dcpo",
        EAPOConfig(),
        controller="target_switch",
        token_weighting=Dcpo(),
        source="2510.08141 (released with it)",
        summary="AEPO without extra rollouts: correct answers' tokens weighted by their probability at the other temperature.",
        formula="A <- (1 - a) A + a [correct] p_T / p, a = b / (1 + b), b = min(|H* - H|, 0.1) / share correct",
    ),
)
