"""Advantages changed turn by turn, by the mean entropy of a turn's tokens (multi-turn agents; without turns: by response)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import require_number
from ..config import EAPOConfig
from ..grouping import Partition
from ..method import Method
from .step_stats import StepStats, TokenWeights
from .token_weighting import TokenWeighting

_EPS = 1e-8


@dataclass(frozen=True)
class Aem(TokenWeighting):
    """alpha = exp(-strength h) / mean_G exp(-strength h), h the turn's mean entropy, scaled to [0, 1] over the group's turns.

    Confident turns count more, for both signs of the advantage. All turns equal: every weight is 1.

    Attributes:
        strength: the exponent's factor; 0 turns the method off. The paper's value is not known to us.
    """

    scope: ClassVar[str] = "group"
    uses: ClassVar[frozenset[str]] = frozenset({"turn_ids"})
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_number("strength", self.strength, 0)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        turns = step_stats.by_turn()
        groups = Partition(step_stats.group_ids[step_stats.sequence_ids], step_stats.valid)
        entropy = turns.mean(step_stats.entropy)
        raised = (-self.strength * _unit_range(entropy, groups.min(entropy), groups.max(entropy))).exp()
        one_each = 1 / turns.counts.clamp_min(1)
        mean = groups.sum(raised * one_each) / groups.sum(one_each).clamp_min(_EPS)
        return TokenWeights(raised / mean.clamp_min(_EPS) * step_stats.token_advantages())


@dataclass(frozen=True)
class Empg(TokenWeighting):
    """A g(h_t) + zeta f(h_{t+1}), centred; g = exp(-k h) / mean exp(-k h), f = exp(-k_future h).

    h is the mean entropy of a turn, scaled to [0, 1] over all turns of the batch; the last turn of a response has no second
    term. The mean over all turns of the batch is subtracted at the end (paper, eqs. 7 and 10 to 12).

    Attributes:
        k, k_future: how fast uncertainty lowers the weight, and the bonus for what follows.
        zeta: factor of the bonus for a clear next turn.
    """

    scope: ClassVar[str] = "batch"
    uses: ClassVar[frozenset[str]] = frozenset({"turn_ids"})
    k: float = 1.0
    k_future: float = 1.0
    zeta: float = 0.1

    def __post_init__(self) -> None:
        require_number("k", self.k, 0)
        require_number("k_future", self.k_future, 0)
        require_number("zeta", self.zeta)

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        turns = step_stats.by_turn()
        entropy = turns.mean(step_stats.entropy)
        h = _unit_range(entropy, step_stats.smallest(entropy), step_stats.largest(entropy))
        gain = (-self.k * h).exp()
        gain = gain / (turns.mean_of_classes(gain) + _EPS)
        next_in_response = turns.following(step_stats.sequence_ids, -1.0) == step_stats.sequence_ids
        bonus = torch.where(next_in_response, turns.following((-self.k_future * h).exp(), 0.0), 0.0)
        advantages = gain * step_stats.token_advantages() + self.zeta * bonus
        return TokenWeights(advantages - turns.mean_of_classes(advantages))


def _unit_range(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(values - low) / (high - low + 1e-8): in [0, 1]."""
    return (values - low) / (high - low + _EPS)


METHODS = (
    Method(
        "aem",
        EAPOConfig(),
        token_weighting=Aem(),
        source="2605.00425",
        summary="Turns that were written with confidence, compared with the group's, count more.",
        formula="A exp(-lambda h) / mean_G exp(-lambda h), h = turn's mean entropy, min-max scaled in the group",
        confidence="medium",
    ),
    Method(
        "empg",
        EAPOConfig(),
        token_weighting=Empg(),
        source="2509.09265",
        summary="Confident steps count more, and a step that leads to a confident one gets a bonus.",
        formula="A g(h_t) + 0.1 f(h_{t+1}) - mean, g = exp(-h) / mean exp(-h), f = exp(-h)",
    ),
)
