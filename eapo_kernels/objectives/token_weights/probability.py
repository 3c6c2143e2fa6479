"""Weights from a token's probability, opposite for responses that are reinforced and those that are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import EAPOConfig
from .step import Method, StepStats, TokenWeighting, TokenWeights, choice, number


@dataclass(frozen=True)
class A3po(TokenWeighting):
    """A_t * positive_scale on the least probable tokens of correct, * negative_scale on the most probable ones of wrong
    responses.

    In each response max(1, floor(share * length)) tokens, by the old policy's probability. The released code keeps
    the scales constant; the paper lets them decay, by a schedule that we have not seen. Source: arXiv 2512.21625.

    Attributes:
        share: of a response's tokens.
        positive_scale, negative_scale: factors on the advantage (2 in the authors' scripts, 5 in their README).
        correct_above: a response is correct when its reward exceeds this.
        gone_at: share of the training over which both scales fall linearly to 1 (our schedule); None: constant.
    """

    scope: ClassVar[str] = "sequence"
    share: float = number(0.2, 0, 1)
    positive_scale: float = number(2.0, 0)
    negative_scale: float = number(2.0, 0)
    correct_above: float = number(0.5)
    gone_at: float | None = number(None, 0, 1, positive=True)

    def __call__(self, step: StepStats) -> TokenWeights:
        responses = step.by_sequence()
        correct = step.per_token((step.rewards > self.correct_above).float()) > 0
        left = 1.0 if self.gone_at is None else max(0.0, 1 - step.progress / self.gone_at)
        scale = 1 + left * (torch.where(correct, self.positive_scale, self.negative_scale) - 1)
        first = responses.rank(torch.where(correct, step.logp, -step.logp))
        chosen = first < (self.share * responses.counts.double()).floor().clamp_min(1)
        return TokenWeights(torch.where(chosen, scale, 1.0) * step.token_advantages())


@dataclass(frozen=True)
class RepoR(TokenWeighting):
    """REPO-R: A - zeta |A| L, L the log-prob, never beyond zero: rare tokens gain more from A > 0 and lose less from A < 0.

        A > 0: max(A (1 - zeta log p), 0)        A < 0: min(A (1 + zeta log p), 0)

    zeta is the controller's and may be negative. The general REPO has any factor in the place of zeta |A|, and
    the centred L = log p - E log p = log p + H. Source: arXiv 2603.11682.

    Attributes:
        form: L is "log_prob" (REPO-R), or "centred".
    """

    scope: ClassVar[str] = "token"
    state: ClassVar[frozenset[str]] = frozenset({"zeta"})
    form: str = choice("log_prob", "centred")

    def __call__(self, step: StepStats) -> TokenWeights:
        advantages = step.token_advantages().double()
        own = step.logp.double() if self.form == "log_prob" else step.logp.double() + step.entropy
        return TokenWeights((1 - advantages.sign() * step.state["zeta"] * own).clamp_min(0) * advantages)


METHODS = (
    Method("a3po", EAPOConfig(reduction="seq_mean_token_mean"), token_weighting=A3po(), source="2512.21625",
        confidence="medium",
        summary="The least probable tokens of correct and the most probable tokens of wrong responses get a larger weight.",
        formula="2 A_t on the 20 % of a correct response's tokens with the lowest p, of a wrong one's with the highest"),
    Method("repo_r", EAPOConfig(), controller="doubling", token_weighting=RepoR(), source="2603.11682",
        confidence="medium",
        summary="Rare tokens are reinforced more and punished less, more so the lower the entropy is against its first value.",
        formula="A (1 - sign(A) zeta log p); zeta doubles while H < H*, halves while H > H*, and may change its sign"),
)  # fmt: skip
