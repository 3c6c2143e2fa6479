"""How per-token terms become one number: a weight per token whose denominator may be global (micro-batches add up exactly)."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from ..errors import EapoError


class Counts(NamedTuple):
    """What a reduction divides by.

    Attributes:
        valid: [N] fp32, 1 for a token that counts, else 0.
        sequence_ids: [N] int64.
        lengths: [B] fp32, valid tokens of each response, of the whole response where it is spread over micro-batches.
        present: 0-dim fp32, responses with a valid token here.
        denominator: 0-dim fp32 or None, the global count that replaces the local one.
        fixed_length: the constant length of ``fixed_length``, or None.
    """

    valid: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    present: Tensor
    denominator: Tensor | None
    fixed_length: int | None

    def tokens(self) -> Tensor:
        return self.valid.sum().clamp_min(1) if self.denominator is None else self.denominator

    def sequences(self) -> Tensor:
        return self.present.clamp_min(1) if self.denominator is None else self.denominator


def token_mean(c: Counts) -> Tensor:
    """Every token counts the same: 1 / tokens (DAPO)."""
    return c.valid / c.tokens()


def seq_mean_token_mean(c: Counts) -> Tensor:
    """Every response counts the same: 1 / (its length * responses) (GRPO)."""
    return c.valid / (c.lengths.clamp_min(1)[c.sequence_ids] * c.sequences())


def seq_mean_token_sum(c: Counts) -> Tensor:
    """Sum over a response's tokens, mean over responses."""
    return c.valid / c.sequences()


def fixed_length(c: Counts) -> Tensor:
    """Sum over tokens / (responses * a constant length): no length bias (Dr. GRPO)."""
    if c.fixed_length is None:
        raise EapoError("fixed_length: expected a positive int with reduction 'fixed_length', got None")
    return c.valid / (c.sequences() * c.fixed_length)


REDUCTIONS: MappingProxyType[str, Callable[[Counts], Tensor]] = MappingProxyType(
    {f.__name__: f for f in (token_mean, seq_mean_token_mean, seq_mean_token_sum, fixed_length)}
)
