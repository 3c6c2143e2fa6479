"""Reductions: a weight per token that turns per-token terms into one number.

The denominator may be global, so that the losses of micro-batches and ranks add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EapoError


class Counts(NamedTuple):
    """What a reduction divides by.

    Attributes:
        valid: [N] fp32, 1 for a token that counts, else 0.
        sequence_ids: [N] int64, 0 at tokens that do not count.
        lengths: [B] fp32, valid tokens of each response, of the whole response where it is spread
            over micro-batches.
        present: 0-dim fp32, number of responses with a valid token here.
        denominator: 0-dim fp32 or None, the global count that replaces the local one.
        fixed_length: the constant length of ``fixed_length``, or None.
    """

    valid: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    present: Tensor
    denominator: Tensor | None
    fixed_length: int | None

    @classmethod
    def of(
        cls,
        valid: Tensor,
        sequence_ids: Tensor,
        size: int,
        *,
        lengths: Tensor | None = None,
        denominator: float | Tensor | None = None,
        fixed_length: int | None = None,
    ) -> Counts:
        """Counted from ``valid`` [N] bool for ``size`` = B responses, but for what is given."""
        ones = valid.float()
        local = ones.new_zeros(size).index_add_(0, sequence_ids, ones)
        if isinstance(denominator, Tensor):
            denominator = denominator.to(ones.device, torch.float32)
        elif denominator is not None:
            denominator = torch.full((), float(denominator), device=ones.device)
        whole = local if lengths is None else lengths.float()
        return cls(ones, sequence_ids, whole, (local > 0).sum().float(), denominator, fixed_length)

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
