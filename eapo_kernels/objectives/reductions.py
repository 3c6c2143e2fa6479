"""Reductions: the weight of each token in the sum of the per-token terms.

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
    """The numbers that a reduction divides by.

    Attributes:
        valid: [N] fp32, 1 for a token that counts, else 0.
        sequence_ids: [N] int64, 0 at tokens that do not count.
        lengths: [B] fp32, valid tokens of each response, in all micro-batches.
        tokens, sequences: 0-dim fp32, number of valid tokens, and of responses that have any; at
            least 1. Both are the global denominator where there is one.
        fixed_length: the constant length of reduction ``fixed_length``, or None.
    """

    valid: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    tokens: Tensor
    sequences: Tensor
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
        """Count ``valid`` [N] bool of ``size`` = B responses; given numbers replace the counts."""
        ones = valid.float()
        here = ones.new_zeros(size).index_add_(0, sequence_ids, ones)
        if denominator is None:
            tokens, sequences = ones.sum().clamp_min(1), (here > 0).sum().float().clamp_min(1)
        else:
            tokens = sequences = (
                denominator.to(ones.device, torch.float32)
                if isinstance(denominator, Tensor)
                else torch.full((), float(denominator), device=ones.device)
            )
        return cls(ones, sequence_ids, here if lengths is None else lengths.float(), tokens, sequences, fixed_length)


def token_mean(c: Counts) -> Tensor:
    """Every token counts the same: 1 / tokens (DAPO)."""
    return c.valid / c.tokens


def seq_mean_token_mean(c: Counts) -> Tensor:
    """Every response counts the same: 1 / (its length * responses) (GRPO)."""
    return c.valid / (c.lengths.clamp_min(1)[c.sequence_ids] * c.sequences)


def seq_mean_token_sum(c: Counts) -> Tensor:
    """Sum over a response's tokens, mean over responses."""
    return c.valid / c.sequences


def fixed_length(c: Counts) -> Tensor:
    """Sum over tokens / (responses * a constant length): no length bias (Dr. GRPO)."""
    if c.fixed_length is None:
        raise EapoError("fixed_length: expected a positive int with reduction 'fixed_length', got None")
    return c.valid / (c.sequences * c.fixed_length)


REDUCTIONS: MappingProxyType[str, Callable[[Counts], Tensor]] = MappingProxyType(
    {f.__name__: f for f in (token_mean, seq_mean_token_mean, seq_mean_token_sum, fixed_length)}
)
