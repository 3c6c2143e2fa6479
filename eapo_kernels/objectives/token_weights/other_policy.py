"""Weights from another policy: the same one at another temperature, or a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import EAPOConfig
from .step import Method, StepStats, TokenWeighting, TokenWeights, number


@dataclass(frozen=True)
class Aepo(TokenWeighting):
    """REINFORCE with advantage ``level`` on marked responses, the config's advantages elsewhere.

    The marked responses ("reinforce") are correct ones that the trainer sampled at the controller's
    temperature in place of ordinary ones. Give them group numbers of their own, so that they do not
    enter the statistics of the ordinary groups. Source: arXiv 2510.08141.

    Attributes:
        level: advantage of the marked responses.
    """

    scope: ClassVar[str] = "sequence"
    uses: ClassVar[frozenset[str]] = frozenset({"reinforce"})
    level: float = number(1.0)

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages()
        return TokenWeights(advantages if step.reinforce is None else torch.where(step.reinforce, self.level, advantages))


@dataclass(frozen=True)
class Dcpo(TokenWeighting):
    """A_t <- (1 - a) A_t + a [correct] p_T(y_t) / p(y_t): AEPO without extra rollouts.

    a = b / (1 + b), b = min(|H* - H|, reach) / share of correct responses. p_T is the policy at the
    controller's temperature, which is above 1 where the entropy H is at or below H*.

    Attributes:
        reach: largest deviation that counts (nats).
        correct_above: a response is correct when its reward exceeds this.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tempered_logp"})
    state: ClassVar[frozenset[str]] = frozenset({"target"})
    reach: float = number(0.1, 0)
    correct_above: float = number(0.5)

    def __call__(self, step: StepStats) -> TokenWeights:
        assert step.tempered_logp is not None
        correct = (step.rewards > self.correct_above).double()
        present = (step.lengths() > 0).double()
        share = (correct * present).sum() / present.sum().clamp_min(1)
        distance = (step.state["target"] - step.mean(step.entropy)).abs().clamp_max(self.reach)
        b = torch.where(share > 0, distance / share.clamp_min(1e-12), 0.0)
        a = b / (1 + b)
        factor = (step.tempered_logp.double() - step.logp).exp()
        return TokenWeights((1 - a) * step.token_advantages() + a * step.per_token(correct) * factor)


@dataclass(frozen=True)
class Trace(TokenWeighting):
    """Marked tokens follow a KL to a teacher: forward in correct responses, reverse in wrong ones.

    All other tokens keep the config's advantage. Only the teacher's log-prob of the sampled token
    is known, so both gradients are one-sample estimates, unbiased for tokens that the old policy
    sampled:

        - grad KL(teacher || pi) = E_{y ~ pi}[(teacher / pi)(y) grad log pi(y)]
        - grad KL(pi || teacher) = E_{y ~ pi}[log(teacher / pi)(y) grad log pi(y)]

    Both factors are truncated at ``most``. The paper (arXiv 2605.10194, abstract only) has the
    teacher's whole distribution; coefficients and schedule are our proposal.

    Attributes:
        forward, reverse: factors of the two divergences; reverse is optional in the paper and off
            by default.
        most: bound of the importance weight, and of |log(teacher / pi)| (nats).
        gone_at: share of the training over which both fade linearly to zero and the config's
            advantage comes back.
        correct_above: a response is correct when its reward exceeds this.
    """

    scope: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp"})
    uses: ClassVar[frozenset[str]] = frozenset({"spans"})
    forward: float = number(1.0, 0)
    reverse: float = number(0.0, 0)
    most: float = number(5.0, 0)
    gone_at: float = number(0.5, 0, 1, positive=True)
    correct_above: float = number(0.5)

    def __call__(self, step: StepStats) -> TokenWeights:
        assert step.teacher_logp is not None
        advantages = step.token_advantages()
        spans = step.valid if step.spans is None else step.valid & step.spans
        correct = step.per_token((step.rewards > self.correct_above).float()) > 0
        gap = step.teacher_logp.double() - step.logp
        left = max(0.0, 1 - step.progress / self.gone_at)
        forward = self.forward * gap.clamp_max(math.log(max(self.most, 1e-30))).exp()
        reverse = self.reverse * gap.clamp(-self.most, self.most)
        for part, factor, guided in ((spans & correct, self.forward, forward), (spans & ~correct, self.reverse, reverse)):
            if factor:
                advantages = torch.where(part, left * guided + (1 - left) * advantages, advantages.double())
        return TokenWeights(advantages)


METHODS = (
    Method("aepo", EAPOConfig(), controller="target_switch", token_weighting=Aepo(), source="2510.08141",
        summary="REINFORCE on correct responses sampled hotter (entropy at or below target) or cooler replaces some responses.",
        formula="A = 1 on the marked responses, else GRPO's; temperature 1.2 where H <= H*, else 0.8"),
    Method("dcpo", EAPOConfig(), controller="target_switch", token_weighting=Dcpo(),
        source="2510.08141 (released with it)",
        summary="AEPO without extra rollouts: correct responses' tokens weighted by their probability at the other "
                "temperature.",
        formula="A <- (1 - a) A + a [correct] p_T / p, a = b / (1 + b), b = min(|H* - H|, 0.1) / share correct"),
    Method("trace", EAPOConfig(), token_weighting=Trace(), source="2605.10194", confidence="low",
        summary="A teacher with more information guides the key spans of correct responses and fades out; the other tokens "
                "keep their advantage.",
        formula="A_t = (1 - v) A + v min(p_T / p, 5) on key spans of correct responses, v falling from 1 to 0"),
)  # fmt: skip
