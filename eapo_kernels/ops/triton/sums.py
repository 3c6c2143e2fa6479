"""Vocabulary sums on their way from the kernels that walk the vocabulary to the one that finishes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..projection import Projection
from ..statistics import merge_ranges
from ..vocab_parallel import NOWHERE, VocabShard
from .math import LN2, LOG2E, LOWEST, NEG_INF


@dataclass(frozen=True)
class PartialSums:
    """Sums of ``statistics.RowSums`` per vocabulary range, to be merged by ``finalize``.

    Attributes:
        values: [fields, splits, N] fp32; fields: row_max (without the target), z_target (0 outside the range that holds it),
            rest, then x_exp with ``entropy``, then exp2, x_exp2 and xx_exp with ``second_moments``. x is relative to the
            row_max of the range; a range without any column has row_max -inf and zero sums.
        entropy, second_moments: which fields are there.
    """

    values: Tensor
    entropy: bool
    second_moments: bool

    @staticmethod
    def fields(entropy: bool, second_moments: bool) -> int:
        """How many fields there are (second moments come with x_exp)."""
        return 7 if second_moments else 4 if entropy else 3

    @staticmethod
    def empty(projection: Projection, splits: int, entropy: bool, second_moments: bool) -> PartialSums:
        fields = PartialSums.fields(entropy, second_moments)
        shape = (fields, splits, projection.n_rows)
        values = projection.hidden.new_empty(shape, dtype=torch.float32)
        return PartialSums(values, entropy, second_moments)

    def whole(self, shard: VocabShard | None, local_targets: Tensor) -> PartialSums:
        """These sums, or where the vocabulary is split over processes those of all of them, a range each. One exchange.

        Rows whose target is no token become NaN.
        """
        self.values[1].masked_fill_(local_targets == NOWHERE, float("nan"))
        if shard is None:
            return self
        return replace(self, values=shard.gather(merge_ranges(self.values)))

    @property
    def splits(self) -> int:
        return self.values.shape[1]


@triton.jit
def store_sums(
    sums, rows, n_rows, split, n_splits, scale, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp,
    ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """Write the sums of one vocabulary range in nats, see ``PartialSums``.

    row_max = scale * y_max is rounded to fp32, up to 5e-4 nats off where logits are 1e4. The sums move by that residue, so that
    they fit the row_max that is written, from which ``backward.gradient_tile`` recomputes x by the same fused multiply-add.
    """
    empty = y_max <= LOWEST
    row_max = y_max * scale
    residue = tl.fma(y_max, scale, -row_max) * LOG2E
    r = tl.exp2(residue)
    xx_exp = r * (xx_exp + residue * (2.0 * x_exp + residue * rest))
    x_exp = r * (x_exp + residue * rest)
    rest *= r
    x_exp2 = r * r * (x_exp2 + residue * exp2)
    exp2 *= r * r
    mask = rows < n_rows
    at = sums + split.to(tl.int64) * n_rows + rows
    field = tl.cast(n_splits, tl.int64) * n_rows
    tl.store(at, tl.where(empty, NEG_INF, row_max), mask=mask)  # [BLOCK_N]
    tl.store(at + field, tl.where(y_target <= LOWEST, NEG_INF, y_target * scale), mask=mask)  # [BLOCK_N]
    # Where there is no maximum every logit may have been NaN, which a maximum ignores.
    tl.store(at + 2 * field, tl.where(empty & (rest == rest), 0.0, rest), mask=mask)  # [BLOCK_N]
    if ENTROPY or SECOND_MOMENTS:
        tl.store(at + 3 * field, tl.where(empty, 0.0, x_exp * LN2), mask=mask)  # [BLOCK_N]
    if SECOND_MOMENTS:
        tl.store(at + 4 * field, tl.where(empty, 0.0, exp2), mask=mask)  # [BLOCK_N]
        tl.store(at + 5 * field, tl.where(empty, 0.0, x_exp2 * LN2), mask=mask)  # [BLOCK_N]
        tl.store(at + 6 * field, tl.where(empty, 0.0, xx_exp * (LN2 * LN2)), mask=mask)  # [BLOCK_N]
