"""What a method that weighs tokens is: a frozen record of its numbers that turns evidence into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .evidence import Evidence, Shaped

STATISTICS = ("second_moments", "tempered_logp", "nucleus_entropy", "teacher_logp", "answer")
"""What a shaper may need beyond log-prob and entropy; names of ``Evidence``'s fields (second_moments: p2 and p2_logp)."""

MARKS = ("turn_ids", "reinforce", "replayed", "spans")
"""What a shaper may use where it is given; names of ``Evidence``'s fields."""


@dataclass(frozen=True)
class Shaper:
    """Base of all shapers: subclasses are frozen dataclasses of numbers, checked at construction.

    A shaper runs on the device of the evidence and never looks at a value from the host. Its weights belong to the old policy,
    where the ratio rho is 1: a paper's factor rho is left to the surrogate.

    Class attributes:
        scope: over what its statistics are taken: "token", "sequence", "group" or "batch".
        needs: names among ``STATISTICS``: ``shape_batch`` refuses to go without.
        uses: names among ``MARKS``, read where they are given.
        state: names of the controller's numbers that it reads.
    """

    scope: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    state: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, evidence: Evidence) -> Shaped:
        """Weights of every token."""
        raise NotImplementedError

    def observed(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Sum and count (0-dim fp64) of what the method's controller watches: the entropies of all tokens."""
        return token_entropy(evidence)


def token_entropy(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Sum of the entropies of the valid tokens (nats) and their number, 0-dim fp64."""
    count = evidence.valid.sum().double()
    return evidence.mean(evidence.entropy) * count, count
