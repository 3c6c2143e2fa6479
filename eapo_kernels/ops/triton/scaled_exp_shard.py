"""Scaled exponentials on a head that is split over the vocabulary: what the ranks exchange (docs/math.md E14).

The target's logit is shared before the product, so that all ranks start from the same offset. Each rank
then finds the rows whose sum is out of range by its own sums (in fp16 by the sums of all ranks), and
rescues them with its own maximum; its offset travels with its sums. All but a few rows keep the common
offset, and have the same E as without a split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import RowStatistics
from ..lm_head import Projection
from ..vocab_shard import ELSEWHERE, VocabShard
from .common import LOG2E, LOWEST

if TYPE_CHECKING:
    from .scaled_exp import ScaledExpSums, Window

NO_COLUMN = 1e38
"""Offset of a row without any column in this shard: E and sum x E are 0."""

NEGLIGIBLE_BITS = 60.0
"""A shard's probabilities are scaled as if its offset lay at most this far below the row's lse. They are all
less than 2^-60 then, and E's row scale stays a normal number."""


def share_offsets(
    projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums, window: Window
) -> None:
    """Give ``sums.offsets`` of all ranks the values of the rank that has the target's weight. One all-reduce of [N].

    targets: [N] from ``VocabShard.local_targets``.
    """
    assert projection.shard is not None
    k, y = sums.offsets
    y.masked_fill_(targets == ELSEWHERE, 0.0)  # an invalid target's is NaN
    projection.shard.all_reduce_(y)
    below = torch.full_like(y, window.without_guess)
    if logp_guess is not None:
        below = torch.where(logp_guess.isfinite(), logp_guess * LOG2E.value + window.with_guess, below)
    k.copy_(torch.where(y <= LOWEST.value, torch.inf, y * projection.row_scale() * LOG2E.value - below))


def sum_over_ranks(projection: Projection, sums: ScaledExpSums, window: Window) -> Tensor | None:
    """[N] sum E over the columns of all ranks without the target, or None where a rank's own sums decide.

    In fp32's range a row is in range wherever the shard's own sum is, which is never less than the target's
    E. fp16 is so narrow that an unlikely target's E is below it, and a shard with little of the row's mass
    would be rescued for nothing. One all-reduce of [N].
    """
    if projection.shard is None or window.largest is None:
        return None
    return projection.shard.all_reduce_(sums.values[0].sum(0))


def mark_empty(sums: ScaledExpSums) -> None:
    """Give rescued rows without a column in this shard an offset that makes E 0."""
    k = sums.offsets[0]
    k.masked_fill_(k == -torch.inf, NO_COLUMN)


def gather_sums(shard: VocabShard, sums: ScaledExpSums) -> ScaledExpSums:
    """The sums of all ranks in the place of column tiles, relative to the largest offset. One all-gather of [2 or 3, N]."""
    k, sum_exp, *x_exp = shard.all_gather(torch.stack([_own_offsets(sums), *sums.values.sum(1)]))  # each [ranks, N]
    top = k.amax(0)
    shift = torch.where(k == -torch.inf, 0.0, k - top)
    r = torch.exp2(shift)
    values = [r * sum_exp] + [r * (x + shift * sum_exp) for x in x_exp]
    return replace(sums, offsets=torch.stack([top, sums.offsets[1]]), values=torch.stack(values))


def fit_factors(
    factors: Tensor, targets: Tensor, own: ScaledExpSums, gathered: ScaledExpSums, statistics: RowStatistics
) -> Tensor:
    """[2, N]: the factors of ``scaled_exp_finalize`` for this shard.

    E of a row that some rank rescued is relative to another offset than the row's sum, and only the rank
    that has the target's column adds the target's entry. own, gathered: before and after ``gather_sums``.
    """
    lowest = statistics.lse * LOG2E.value - NEGLIGIBLE_BITS
    shard_scale = torch.exp2(torch.maximum(_own_offsets(own), lowest) - gathered.offsets[0])
    return torch.stack([factors[0] * shard_scale, torch.where(targets >= 0, factors[1], 0.0)])


def _own_offsets(sums: ScaledExpSums) -> Tensor:
    """[N] this shard's k, -inf where it has no column."""
    k = sums.offsets[0]
    return torch.where(k == NO_COLUMN, -torch.inf, k)
