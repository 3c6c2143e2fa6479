"""The collectives of scaled exponentials on a head that is split over ranks (docs/math.md E14).

The target's logit is exchanged before the product, so that all ranks start from the same offset.
Each rank then checks its rows by its own sums (in fp16 by the sums over all ranks) and rescues rows
out of range with its own maximum; its offsets are gathered with its sums. Rows that no rank rescues
have the same E as without a split.
"""

from __future__ import annotations

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
"""Offset of a row without any finite logit in this shard: E and sum x E are 0."""

NEGLIGIBLE_BITS = 60.0
"""A shard's offset counts as at most this far below the row's lse, so that the row scale of E stays
a normal number. A shard below that has probabilities of less than 2^-60."""


def share_offsets(
    projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums, window: Window
) -> None:
    """Set ``sums.offsets`` on all ranks to the values of the rank that holds the target's weight.
    One all-reduce of [N].

    targets: [N] from ``VocabShard.local_targets``.
    """
    assert projection.shard is not None
    k, y = sums.offsets
    y.masked_fill_(targets == ELSEWHERE, 0.0)  # rows of an invalid target stay NaN
    projection.shard.all_reduce_(y)
    below = torch.full_like(y, window.without_guess)
    if logp_guess is not None:
        below = torch.where(logp_guess.isfinite(), logp_guess * LOG2E.value + window.with_guess, below)
    k.copy_(torch.where(y <= LOWEST.value, torch.inf, y * projection.row_scale() * LOG2E.value - below))


def sum_over_ranks(projection: Projection, sums: ScaledExpSums, window: Window) -> Tensor | None:
    """[N] sum E of all ranks without the target, or None where each rank checks its own sums.

    Each rank's own sum includes the target's E, which keeps it in range in fp32's exponent range.
    fp16 is narrower: the target's E may be below ``Window.least``, and a shard with little of the
    row's probability would rescue the row without need. One all-reduce of [N].
    """
    if projection.shard is None or window.largest is None:
        return None
    return projection.shard.all_reduce_(sums.values[0].sum(0))


def mark_empty(sums: ScaledExpSums) -> None:
    """Set the offset of rescued rows without a finite logit in this shard to one that makes E 0."""
    k = sums.offsets[0]
    k.masked_fill_(k == -torch.inf, NO_COLUMN)


def gather_sums(shard: VocabShard, sums: ScaledExpSums) -> ScaledExpSums:
    """The ranks' sums as column tiles, relative to the largest offset. One all-gather."""
    k, sum_exp, *x_exp = shard.all_gather(torch.stack([_own_offsets(sums), *sums.values.sum(1)]))  # each [ranks, N]
    top = k.amax(0)
    shift = torch.where(k == -torch.inf, 0.0, k - top)
    r = torch.exp2(shift)
    values = [r * sum_exp] + [r * (x + shift * sum_exp) for x in x_exp]
    return sums._replace(offsets=torch.stack([top, sums.offsets[1]]), values=torch.stack(values))


def fit_factors(
    factors: Tensor, targets: Tensor, own: ScaledExpSums, gathered: ScaledExpSums, statistics: RowStatistics
) -> Tensor:
    """[2, N]: ``factors`` of ``scaled_exp_finalize`` for this shard.

    E of a row that a rank rescued is relative to that rank's offset. Only the rank that holds the
    target's column adds the target's entry. own, gathered: sums before and after ``gather_sums``.
    """
    lowest = statistics.lse * LOG2E.value - NEGLIGIBLE_BITS
    shard_scale = torch.exp2(torch.maximum(_own_offsets(own), lowest) - gathered.offsets[0])
    return torch.stack([factors[0] * shard_scale, torch.where(targets >= 0, factors[1], 0.0)])


def _own_offsets(sums: ScaledExpSums) -> Tensor:
    """[N] this shard's k, -inf where it has no finite logit."""
    k = sums.offsets[0]
    return torch.where(k == NO_COLUMN, -torch.inf, k)
