"""The scaled-exponential form with the vocabulary split over processes: what is exchanged, and what changes in a chunk (docs/math.md E14).

z_y is shared before the product, so that all processes start from the same offset. Each process then judges the rows by its own
sums, in fp16 by everybody's (``sum_everywhere``), and redoes those that are not sound with its own maximum; its offset travels
with its sums. Rows whose offset is everybody's, which is all but a few, have the same E as without a split.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..projection import Projection
from ..statistics import RowStatistics
from ..vocab_parallel import ELSEWHERE, VocabShard
from .math import LOG2E, LOWEST
from .offsets import ScaledExpSums, window

NO_COLUMN = 1e38
"""Offset of a row that has lost all columns of this shard: E is 0, and sum x E too."""

NEGLIGIBLE_BITS = 60.0
"""Probabilities of a shard are given as if its offset lay at most this far below the row's lse: all less than 2^-60, and E's
row factor stays a normal number."""


def share_offsets(projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums) -> None:
    """Make ``sums.offsets`` (``offsets.row_offsets``) everybody's: k and y_y from the process that has the target's weight.

    targets: [N] columns of this shard, or what ``VocabShard.local_targets`` says instead. One exchange of [N].
    """
    assert projection.shard is not None
    k, y = sums.offsets
    y.masked_fill_(targets == ELSEWHERE, 0.0)  # NaN where the target is nobody's
    projection.shard.add_(y)
    limits = window(projection.operand_dtype)
    below = torch.full_like(y, limits.without_guess)
    if logp_guess is not None:
        below = torch.where(logp_guess.isfinite(), logp_guess * LOG2E.value + limits.with_guess, below)
    k.copy_(torch.where(y <= LOWEST.value, torch.inf, y * projection.row_scale() * LOG2E.value - below))


def sum_everywhere(projection: Projection, sums: ScaledExpSums) -> Tensor | None:
    """[N] sum E over the columns of all processes without the target, or None where a process can judge its rows alone.

    In fp32's range a row is sound wherever the shard's own sum is, which is never less than the target's E. fp16 is so narrow
    that an unlikely target's E is below it, and a shard without much of the row's mass would be redone for nothing. One
    exchange of [N].
    """
    if projection.shard is None or window(projection.operand_dtype).largest is None:
        return None
    return projection.shard.add_(sums.values[0].sum(0))


def mark_empty(sums: ScaledExpSums) -> None:
    """Rows that were redone and found no column here, to be run with E = 0."""
    k = sums.offsets[0]
    k.masked_fill_(k == -torch.inf, NO_COLUMN)


def gather_sums(shard: VocabShard, sums: ScaledExpSums) -> ScaledExpSums:
    """The sums of all shards in the place of column tiles, relative to the largest offset. One exchange of [2 or 3, N]."""
    k, rest, *x_exp = shard.gather(torch.stack([_own_offsets(sums), *sums.values.sum(1)]))  # each [processes, N]
    top = k.amax(0)
    shift = torch.where(k == -torch.inf, 0.0, k - top)
    r = torch.exp2(shift)
    values = [r * rest] + [r * (x + shift * rest) for x in x_exp]
    return replace(sums, offsets=torch.stack([top, sums.offsets[1]]), values=torch.stack(values))


def fit_slopes(slopes: Tensor, targets: Tensor, own: ScaledExpSums, whole: ScaledExpSums, statistics: RowStatistics) -> Tensor:
    """[2, N]: the slopes of ``scaled_exp_finalize`` as this shard needs them.

    E of a row redone here or elsewhere is relative to another offset than the row's sum, and the target's entry is wanted from
    the process that has its column. own, whole: before and after ``gather_sums``.
    """
    lowest = statistics.lse * LOG2E.value - NEGLIGIBLE_BITS
    unit = torch.exp2(torch.maximum(_own_offsets(own), lowest) - whole.offsets[0])
    return torch.stack([slopes[0] * unit, torch.where(targets >= 0, slopes[1], 0.0)])


def _own_offsets(sums: ScaledExpSums) -> Tensor:
    """[N] this shard's k, -inf where it has no column."""
    k = sums.offsets[0]
    return torch.where(k == NO_COLUMN, -torch.inf, k)
