"""A teacher's log-probs on key spans, GRPO on the rest (arXiv 2605.10194)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...checks import require_number
from ...errors import require
from ..config import EAPOConfig
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting


@dataclass(frozen=True)
class Trace(TokenWeighting):
    """On marked tokens of correct responses a forward, of wrong ones a reverse KL to the teacher; GRPO's advantage elsewhere.

    Only the teacher's log-prob of the sampled token is known, so both are one-sample estimates, exact in expectation at the old
    policy for tokens it sampled: - grad KL(teacher || pi) = E_{y ~ pi}[(teacher / pi)(y) grad log pi(y)], the importance weight
    truncated at ``most``, and - grad KL(pi || teacher) = E_{y ~ pi}[log(teacher / pi)(y) grad log pi(y)]. The paper (abstract
    only) has the teacher's whole distribution; coefficients and schedule are our proposal.

    Attributes:
        forward, reverse: factors of the two divergences; reverse is off by default, as optional in the paper.
        most: bound of the importance weight, and of |log(teacher / pi)| (nats).
        gone_at: share of the training after which both are off and GRPO's advantage is back everywhere, linearly before.
        correct_above: a response is correct when its reward exceeds this.
    """

    scope: ClassVar[str] = "group"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logp"})
    uses: ClassVar[frozenset[str]] = frozenset({"spans"})
    forward: float = 1.0
    reverse: float = 0.0
    most: float = 5.0
    gone_at: float = 0.5
    correct_above: float = 0.5

    def __post_init__(self) -> None:
        for name in ("forward", "reverse", "most"):
            require_number(name, getattr(self, name), 0)
        require_number("gone_at", self.gone_at, 0, 1)
        require(self.gone_at > 0, "gone_at", "a number in (0, 1]", self.gone_at)
        require_number("correct_above", self.correct_above)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        assert step_stats.teacher_logp is not None
        advantages = step_stats.token_advantages()
        spans = step_stats.valid if step_stats.spans is None else step_stats.valid & step_stats.spans
        correct = step_stats.per_token((step_stats.rewards > self.correct_above).float()) > 0
        gap = step_stats.teacher_logp.double() - step_stats.logp
        left = max(0.0, 1 - step_stats.progress / self.gone_at)
        toward = self.forward * gap.clamp_max(math.log(max(self.most, 1e-30))).exp()
        away = self.reverse * gap.clamp(-self.most, self.most)
        for part, factor, guided in ((spans & correct, self.forward, toward), (spans & ~correct, self.reverse, away)):
            if factor:
                advantages = torch.where(part, left * guided + (1 - left) * advantages, advantages.double())
        return TokenWeights(advantages)


METHODS = (
    Method(
        "trace",
        EAPOConfig(),
        token_weighting=Trace(),
        source="2605.10194",
        summary="A teacher that saw more guides the key spans of correct answers, less and less; GRPO on the rest.",
        formula="A_t = (1 - v) A + v min(p_T / p, 5) on key spans of correct responses, v falling from 1 to 0",
        confidence="low",
    ),
)
