"""A target entropy, reached with samples of another temperature (arXiv 2510.08141)."""

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
class Aepo(Shaper):
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

    def __call__(self, evidence: Evidence) -> Shaped:
        advantages = evidence.token_advantages()
        return Shaped(advantages if evidence.reinforce is None else torch.where(evidence.reinforce, self.level, advantages))


@dataclass(frozen=True)
class Dcpo(Shaper):
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

    def __call__(self, evidence: Evidence) -> Shaped:
        assert evidence.tempered_logp is not None
        correct = (evidence.rewards > self.correct_above).double()
        present = (evidence.lengths() > 0).double()
        share = (correct * present).sum() / present.sum().clamp_min(1)
        distance = (evidence.state["target"] - evidence.mean(evidence.entropy)).abs().clamp_max(self.reach)
        b = torch.where(share > 0, distance / share.clamp_min(1e-12), 0.0)
        a = b / (1 + b)
        factor = (evidence.tempered_logp.double() - evidence.logp).exp()
        return Shaped((1 - a) * evidence.token_advantages() + a * evidence.per_token(correct) * factor)


METHODS = (
    Method(
        "aepo",
        EAPOConfig(),
        controller="target_switch",
        shaper=Aepo(),
        source="2510.08141",
        summary="REINFORCE on correct answers sampled hotter (entropy at or below target) or cooler replaces some of GRPO's.",
        formula="A = 1 on the marked responses, else GRPO's; temperature 1.2 where H <= H*, else 0.8",
    ),
    Method(
        "dcpo",
        EAPOConfig(),
        controller="target_switch",
        shaper=Dcpo(),
        source="2510.08141 (released with it)",
        summary="AEPO without extra rollouts: correct answers' tokens weighted by their probability at the other temperature.",
        formula="A <- (1 - a) A + a [correct] p_T / p, a = b / (1 + b), b = min(|H* - H|, 0.1) / share correct",
    ),
)
