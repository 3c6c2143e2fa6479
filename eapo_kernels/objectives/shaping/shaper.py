"""What a method that weighs tokens is: a frozen record of its numbers that turns evidence into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .evidence import Evidence, Shaped

STATISTICS = (
    "second_moments",
    "tempered_logp",
    "nucleus_entropy",
    "teacher_logp",
    "answer",
    "turn_ids",
)
"""What a shaper may need beyond log-prob and entropy; names of ``Evidence``'s fields (second_moments: p2 and p2_logp)."""


@dataclass(frozen=True)
class Shaper:
    """Base of all shapers: subclasses are frozen dataclasses of numbers, checked at construction.

    Class attributes:
        scope: over what its statistics are taken: "token", "sequence", "group" or "batch".
        needs: names among ``STATISTICS``.
    """

    scope: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, evidence: Evidence) -> Shaped:
        """Weights of every token."""
        raise NotImplementedError
