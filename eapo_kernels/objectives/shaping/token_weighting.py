"""What a method that weighs tokens is: a frozen record of its numbers that turns step_stats into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .step_stats import StepStats, TokenWeights

STATISTICS = ("second_moments", "tempered_logp", "nucleus_entropy", "teacher_logp", "answer")
"""What a token_weighting may need beyond log-prob and entropy; names of ``StepStats``'s fields (second_moments: p2 and p2_logp)."""

MARKS = ("turn_ids", "reinforce", "replayed", "spans")
"""What a token_weighting may use where it is given; names of ``StepStats``'s fields."""


@dataclass(frozen=True)
class TokenWeighting:
    """Base of all token weightings: subclasses are frozen dataclasses of numbers, checked at construction.

    A token_weighting runs on the device of the step_stats and never looks at a value from the host. Its weights belong to the old policy,
    where the ratio rho is 1: a paper's factor rho is left to the surrogate.

    Class attributes:
        scope: over what its statistics are taken: "token", "sequence", "group" or "batch".
        needs: names among ``STATISTICS``: ``weight_tokens`` refuses to go without.
        uses: names among ``MARKS``, read where they are given.
        state: names of the controller's numbers that it reads.
    """

    scope: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, step_stats: StepStats) -> TokenWeights:
        """Weights of every token."""
        raise NotImplementedError

    def observed(self, step_stats: StepStats) -> tuple[Tensor, Tensor]:
        """Sum and count (0-dim fp64) of what the method's controller watches: the entropies of all tokens."""
        return token_entropy(step_stats)


def token_entropy(step_stats: StepStats) -> tuple[Tensor, Tensor]:
    """Sum of the entropies of the valid tokens (nats) and their number, 0-dim fp64."""
    count = step_stats.valid.sum().double()
    return step_stats.mean(step_stats.entropy) * count, count
