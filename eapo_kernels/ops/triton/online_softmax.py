"""Row statistics by an online softmax (E3, E4), from streamed products or from stored logits.

Each program reduces a range of the vocabulary for a tile of rows to partial sums. ``finalize``
merges the ranges and computes the statistics, and with ``SurrogateTerms`` the loss terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunking import cdiv
from ..dispatch import RowStatistics, SurrogateTerms
from ..lm_head import Projection
from ..vocab_shard import INVALID, VocabShard, merge_ranges
from . import tiles
from .surrogate import Finalized, store_surrogate, surrogate_arguments
from .tiles import Tile

from .common import (  # isort: skip
    LN2, LOG2E, LOWEST, NEG_INF, PER_CALL, Launch, family, group_order, log1p, options, product_arguments, product_tile,
    raw_logits, row_scale, shape_logits, split_columns, tile_has_target_or_tail,
)  # fmt: skip


@dataclass(frozen=True)
class PartialSums:
    """Sums of each vocabulary range of each row, the input of ``finalize``.

    Attributes:
        values: [fields, splits, N] fp32. Fields: row_max; z_target, 0 outside the target's range;
            sum_exp = sum e^x. With ``entropy`` also x_exp = sum x e^x. With ``second_moments`` also
            exp2 = sum e^2x, x_exp2 = sum x e^2x, xx_exp = sum x^2 e^x. x = z - row_max of the
            range. All fields but z_target leave out the target's column. A range without columns
            has row_max -inf and sums of zero.
        entropy, second_moments: which fields exist.
    """

    values: Tensor
    entropy: bool
    second_moments: bool

    @staticmethod
    def fields(entropy: bool, second_moments: bool) -> int:
        """Number of fields; second moments include x_exp."""
        return 7 if second_moments else 4 if entropy else 3

    @staticmethod
    def empty(projection: Projection, splits: int, entropy: bool, second_moments: bool) -> PartialSums:
        fields = PartialSums.fields(entropy, second_moments)
        shape = (fields, splits, projection.n_rows)
        values = projection.hidden.new_empty(shape, dtype=torch.float32)
        return PartialSums(values, entropy, second_moments)

    def all_gathered(self, shard: VocabShard | None, local_targets: Tensor) -> PartialSums:
        """These sums, NaN in rows of an invalid target; on a split head one range per rank.

        One all-gather on a split head.
        """
        self.values[1].masked_fill_(local_targets == INVALID, float("nan"))
        if shard is None:
            return self
        return replace(self, values=shard.all_gather(merge_ranges(self.values)))

    @property
    def splits(self) -> int:
        return self.values.shape[1]


@triton.jit
def take_target(y, y_target, target, first_column, n_columns, BLOCK_V: tl.constexpr):
    """(y with the target and the tail masked, y_target + the tile's target logit if any)."""
    columns = tl.arange(0, BLOCK_V)[None, :]
    is_target = columns == (target - first_column)[:, None]
    y_target += tl.sum(tl.where(is_target, y, 0.0), 1)
    return tl.where(is_target | (columns >= n_columns - first_column), LOWEST, y), y_target


@triton.jit
def accumulate(y, y_max, sum_exp, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr):
    """Add a tile y [BLOCK_N, BLOCK_V] to the sums of E3 and E4, rescaled to the new maximum.

    With x = (y - y_max) * scale2 in bits, scale2 = scale * log2(e): sum_exp = sum 2^x,
    x_exp = sum x 2^x, exp2 = sum 4^x, x_exp2 = sum x 4^x, xx_exp = sum x^2 2^x. All [BLOCK_N].
    """
    new_max = tl.maximum(y_max, tl.max(y, 1))
    shift = (y_max - new_max) * scale2
    r = tl.exp2(shift)
    x = (y - new_max[:, None]) * scale2[:, None]
    e = tl.exp2(x)
    if ENTROPY or SECOND_MOMENTS:
        weighted = x * e
        if SECOND_MOMENTS:  # the square of LOWEST would be infinite
            d = tl.where(r > 0.0, shift, 0.0)
            xx_exp = r * (xx_exp + d * (2.0 * x_exp + d * sum_exp)) + tl.sum(x * weighted, 1)
        x_exp = r * (x_exp + shift * sum_exp) + tl.sum(weighted, 1)
    sum_exp = r * sum_exp + tl.sum(e, 1)
    if SECOND_MOMENTS:
        square = e * e
        x_exp2 = r * r * (x_exp2 + shift * exp2) + tl.sum(x * square, 1)
        exp2 = r * r * exp2 + tl.sum(square, 1)
    return new_max, sum_exp, x_exp, exp2, x_exp2, xx_exp


@triton.jit
def online_softmax_update(
    raw, bias, bias_stride, cap, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, target, first_column, n_columns, scale2,
    BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """Add a tile of raw logits to the running sums, and its target's logit to ``y_target``.

    Both branches end in sums, so that they return row vectors only: a tile returned by a branch
    would be held twice, which costs up to 100 registers per thread. SLICES (1, 2, 4 ...):
    column slices that are processed one after the other; more of them need fewer temporaries.
    """
    if SLICES == 1:
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1)
        y, _ = shape_logits(raw, bias, bias_stride, columns, cap)
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            y, y_target = take_target(y, y_target, target, first_column, n_columns, BLOCK_V)
            y_max, sum_exp, x_exp, exp2, x_exp2, xx_exp = accumulate(
                y, y_max, sum_exp, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY, SECOND_MOMENTS
            )
        else:
            y_max, sum_exp, x_exp, exp2, x_exp2, xx_exp = accumulate(
                y, y_max, sum_exp, x_exp, exp2, x_exp2, xx_exp, scale2, ENTROPY, SECOND_MOMENTS
            )
    else:
        left, right = split_columns(raw, BLOCK_V)
        y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            left, bias, bias_stride, cap, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, target,
            first_column, n_columns, scale2, BLOCK_V // 2, SLICES // 2, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
        y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            right, bias, bias_stride, cap, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, target,
            first_column + BLOCK_V // 2, n_columns, scale2, BLOCK_V // 2, SLICES // 2, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
    return y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp


@triton.jit
def store_sums(
    sums, rows, n_rows, split, n_splits, scale, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp,
    ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """Write the sums of one vocabulary range, in nats; see ``PartialSums``.

    row_max = scale * y_max is rounded to fp32, by up to 5e-4 nats for logits of 1e4. The sums are
    moved by that residue: they fit the row_max that is stored, from which
    ``logit_grad.gradient_tile`` recomputes x by the same fused multiply-add.
    """
    empty = y_max <= LOWEST
    row_max = y_max * scale
    residue = tl.fma(y_max, scale, -row_max) * LOG2E
    r = tl.exp2(residue)
    xx_exp = r * (xx_exp + residue * (2.0 * x_exp + residue * sum_exp))
    x_exp = r * (x_exp + residue * sum_exp)
    sum_exp *= r
    x_exp2 = r * r * (x_exp2 + residue * exp2)
    exp2 *= r * r
    mask = rows < n_rows
    at = sums + split.to(tl.int64) * n_rows + rows
    field = tl.cast(n_splits, tl.int64) * n_rows
    tl.store(at, tl.where(empty, NEG_INF, row_max), mask=mask)  # [BLOCK_N]
    tl.store(at + field, tl.where(y_target <= LOWEST, NEG_INF, y_target * scale), mask=mask)  # [BLOCK_N]
    # A maximum ignores NaN: in an empty range every logit may have been NaN, and then the sum is.
    tl.store(at + 2 * field, tl.where(empty & (sum_exp == sum_exp), 0.0, sum_exp), mask=mask)  # [BLOCK_N]
    if ENTROPY or SECOND_MOMENTS:
        tl.store(at + 3 * field, tl.where(empty, 0.0, x_exp * LN2), mask=mask)  # [BLOCK_N]
    if SECOND_MOMENTS:
        tl.store(at + 4 * field, tl.where(empty, 0.0, exp2), mask=mask)  # [BLOCK_N]
        tl.store(at + 5 * field, tl.where(empty, 0.0, x_exp2 * LN2), mask=mask)  # [BLOCK_N]
        tl.store(at + 6 * field, tl.where(empty, 0.0, xx_exp * (LN2 * LN2)), mask=mask)  # [BLOCK_N]


@triton.jit(do_not_specialize=PER_CALL)
def stream_statistics_kernel(
    sums, hidden, weight, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, n_splits, tiles_per_split,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Sums of a row tile over a range of ``tiles_per_split`` vocabulary tiles per program.

    sums: see ``PartialSums``; each element is written once. targets: [n_rows] int64 in
    [0, n_columns). The others: see ``raw_logits``, ``shape_logits`` and ``row_scale``.
    """
    row_tile, split = group_order(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), n_splits, GROUP_N)
    first_row = row_tile * BLOCK_N
    rows = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)
    safe_rows = tl.minimum(rows, n_rows - 1)
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    factor = row_scale(row_inv_temperature, scale, safe_rows)
    y_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    y_target = tl.zeros([BLOCK_N], tl.float32)
    sum_exp = tl.zeros([BLOCK_N], tl.float32)
    x_exp = tl.zeros([BLOCK_N], tl.float32)
    exp2 = tl.zeros([BLOCK_N], tl.float32)
    x_exp2 = tl.zeros([BLOCK_N], tl.float32)
    xx_exp = tl.zeros([BLOCK_N], tl.float32)
    end = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(n_columns, BLOCK_V))
    for tile in range(split * tiles_per_split, end):
        first = tile * BLOCK_V
        raw = raw_logits(
            hidden, weight, first_row, first, n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v,
            weight_stride_d, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
        )  # fmt: skip
        y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            raw, bias, bias_stride, cap, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, target, first, n_columns,
            factor * LOG2E, BLOCK_V, SLICES, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
    store_sums(
        sums, rows, n_rows, split, n_splits, factor, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, ENTROPY,
        SECOND_MOMENTS,
    )  # fmt: skip


def stream_statistics(
    projection: Projection,
    targets: Tensor,
    *,
    entropy: bool,
    second_moments: bool,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Launch, PartialSums]:
    """The launch, and the sums that it fills. One program a row tile and range.

    The ranges depend on V and the tile, and the tile on D, V and dtype, so a row's sums are the same
    bits in any batch. targets: [N] int64 in [0, V). tile: instead of the table's. splits: number of
    ranges, instead of those of ``tiles.RANGE_COLUMNS``.
    """
    tile = tile or product_tile("stream_statistics", projection)
    row_tiles, column_tiles = cdiv(projection.n_rows, tile.block_n), cdiv(projection.vocab, tile.block_v)
    length = tiles.range_tiles(tile.block_v) if splits is None else cdiv(column_tiles, splits)
    splits = cdiv(column_tiles, length)
    sums = PartialSums.empty(projection, splits, entropy, second_moments)
    itemsize = projection.hidden.element_size()
    arguments = product_arguments(projection, tile) | {
        "GROUP_N": tiles.live_row_tiles(tile.group_n, tile.block_n, projection.dim, itemsize),
        "sums": sums.values, "targets": targets.contiguous(), "n_splits": splits, "tiles_per_split": length,
        "ENTROPY": entropy, "SECOND_MOMENTS": second_moments, "SLICES": tile.slices,
    }  # fmt: skip
    launch = Launch(stream_statistics_kernel, row_tiles * splits, arguments, options(tile), projection.hidden.device)
    return launch, sums


def streamed(
    launcher: Callable[..., tuple[Callable[[], None], PartialSums]], projection: Projection, targets: Tensor, *,
    entropy: bool, second_moments: bool, budget: int,
) -> RowStatistics:  # fmt: skip
    """Statistics by two launches, ``launcher``'s and ``finalize``; more rows than the sums' budget
    allows are computed some at a time, which changes no bit.

    launcher: ``stream_statistics``, or another backend's with the same outputs.
    """
    rows = tiles.rows_within(budget, projection.n_rows, PartialSums.fields(entropy, second_moments), projection.max_shard_vocab)
    parts = []
    for start in range(0, projection.n_rows, rows):
        part, here = projection.rows(slice(start, start + rows)), targets[start : start + rows]
        launch, sums = launcher(part, here, entropy=entropy, second_moments=second_moments)
        launch()
        last, final = finalize(sums.all_gathered(projection.shard, here))
        last()
        parts.append(final.statistics())
    return RowStatistics.cat(parts)


@triton.jit
def load_tile(raw, raw_stride, safe_rows, first_column, BLOCK_V: tl.constexpr):
    """Raw logits [BLOCK_N, BLOCK_V]; those behind the last column are undefined.

    The mask ends at the row's stride instead of the last column: the compiler knows its alignment,
    so an odd vocabulary is loaded in vectors too.
    """
    columns = first_column + tl.arange(0, BLOCK_V)
    at = raw + safe_rows[:, None] * raw_stride + columns[None, :]
    return tl.load(at, mask=(columns < raw_stride)[None, :], other=0.0)  # [BLOCK_N, BLOCK_V]


@triton.jit(do_not_specialize=PER_CALL)
def row_statistics_kernel(
    sums, raw, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, raw_stride, bias_stride, n_splits,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of one tile of raw logits [n_rows, n_columns] fp32 per program.

    As ``stream_statistics_kernel``, with vocabulary ranges of one tile. Consecutive programs read
    consecutive tiles of a row.
    """
    split = tl.program_id(0) % n_splits
    rows = (tl.program_id(0) // n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, n_rows - 1)
    first = split * BLOCK_V
    tile = load_tile(raw, raw_stride, safe_rows, first, BLOCK_V)
    factor = row_scale(row_inv_temperature, scale, safe_rows)
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    zero = tl.zeros([BLOCK_N], tl.float32)
    y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
        tile, bias, bias_stride, cap, tl.full([BLOCK_N], LOWEST, tl.float32), zero, zero, zero, zero, zero, zero, target, first,
        n_columns, factor * LOG2E, BLOCK_V, 1, ENTROPY, SECOND_MOMENTS,
    )  # fmt: skip
    store_sums(
        sums, rows, n_rows, split, n_splits, factor, y_max, y_target, sum_exp, x_exp, exp2, x_exp2, xx_exp, ENTROPY,
        SECOND_MOMENTS,
    )  # fmt: skip


def row_statistics(
    raw: Tensor, projection: Projection, targets: Tensor, *, entropy: bool, tile: Tile | None = None
) -> tuple[Launch, PartialSums]:
    """The launch that reduces raw logits [N, V] fp32, and the sums that it fills."""
    tile = tile or tiles.find("row_statistics", family(raw.device), 4)
    splits = cdiv(projection.vocab, tile.block_v)
    sums = PartialSums.empty(projection, splits, entropy, False)
    arguments = projection.arguments | {
        "sums": sums.values, "raw": raw, "raw_stride": raw.stride(0), "targets": targets.contiguous(), "n_splits": splits,
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "ENTROPY": entropy, "SECOND_MOMENTS": False,
    }  # fmt: skip
    grid = cdiv(projection.n_rows, tile.block_n) * splits
    return Launch(row_statistics_kernel, grid, arguments, options(tile), raw.device), sums


@triton.jit
def merge_sums(sums, rows, n_rows, n_splits, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr):
    """The fields of ``PartialSums`` merged over all ranges (E14), each [BLOCK_N].

    row_max includes the target. Two passes in a fixed order: the maximum first, then each range is
    rescaled to it and added.
    """
    field = tl.cast(n_splits, tl.int64) * n_rows
    row_max = tl.full(rows.shape, NEG_INF, tl.float32)
    z_target = tl.zeros(rows.shape, tl.float32)
    for split in range(0, n_splits):
        at = sums + tl.cast(split, tl.int64) * n_rows + rows
        row_max = tl.maximum(row_max, tl.load(at))  # [BLOCK_N]
        z_target += tl.load(at + field)  # [BLOCK_N]
    row_max = tl.maximum(row_max, z_target)
    sum_exp = tl.zeros(rows.shape, tl.float32)
    x_exp = tl.zeros(rows.shape, tl.float32)
    exp2 = tl.zeros(rows.shape, tl.float32)
    x_exp2 = tl.zeros(rows.shape, tl.float32)
    xx_exp = tl.zeros(rows.shape, tl.float32)
    for split in range(0, n_splits):
        at = sums + tl.cast(split, tl.int64) * n_rows + rows
        shift = tl.load(at) - row_max  # [BLOCK_N]
        r = tl.exp(shift)
        shift = tl.where(r > 0.0, shift, 0.0)
        part = tl.load(at + 2 * field)  # [BLOCK_N]
        sum_exp += r * part
        if ENTROPY or SECOND_MOMENTS:
            first = tl.load(at + 3 * field)  # [BLOCK_N]
            if SECOND_MOMENTS:
                xx_exp += r * (tl.load(at + 6 * field) + shift * (2.0 * first + shift * part))  # [BLOCK_N]
            x_exp += r * (first + shift * part)
        if SECOND_MOMENTS:
            part = tl.load(at + 4 * field)  # [BLOCK_N]
            exp2 += r * r * part
            x_exp2 += r * r * (tl.load(at + 5 * field) + shift * part)  # [BLOCK_N]
    return row_max, z_target, sum_exp, x_exp, exp2, x_exp2, xx_exp


@triton.jit(do_not_specialize=PER_CALL)
def finalize_kernel(
    out, sums, n_rows, n_splits,
    coefficient, totals, sequence_ids, valid, old_logp, scale, advantages, rewards, thresholds, positive_weight,
    negative_weight, ratio_low, ratio_high, dual_clip,
    BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Statistics of a block of tokens (E2 to E4), and with SURROGATE its loss terms.

    out: [4, 6 or 9, n_rows] fp32: logp, lse, row_max, log_sum, then entropy and mean_shifted, then
        p2, p2_logp, varentropy. sums: see ``PartialSums``.
    From ``coefficient`` on: see ``store_surrogate``.
    """
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    row_max, z_target, sum_exp, x_exp, exp2, x_exp2, xx_exp = merge_sums(sums, rows, n_rows, n_splits, ENTROPY, SECOND_MOMENTS)
    x = z_target - row_max
    e = tl.exp(x)
    s0 = sum_exp + e
    top = x == 0.0
    log_sum = tl.where(top, log1p(sum_exp), tl.log(s0))
    logp = tl.where(top, -log_sum, x - log_sum)
    at = out + rows
    field = tl.cast(n_rows, tl.int64)
    tl.store(at, logp, mask=mask)  # [BLOCK_N]
    tl.store(at + field, row_max + log_sum, mask=mask)  # [BLOCK_N]
    tl.store(at + 2 * field, row_max, mask=mask)  # [BLOCK_N]
    tl.store(at + 3 * field, log_sum, mask=mask)  # [BLOCK_N]
    x = tl.where(e > 0.0, x, 0.0)  # x e^x -> 0 at x = -inf
    entropy = tl.zeros([BLOCK_N], tl.float32)
    if ENTROPY:
        mean = (x_exp + x * e) / s0
        entropy = log_sum - mean
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(at + 4 * field, entropy, mask=mask)  # [BLOCK_N]
        tl.store(at + 5 * field, mean, mask=mask)  # [BLOCK_N]
    if SECOND_MOMENTS:
        p2 = (exp2 + e * e) / (s0 * s0)
        tl.store(at + 6 * field, p2, mask=mask)  # [BLOCK_N]
        tl.store(at + 7 * field, (x_exp2 + x * (e * e)) / (s0 * s0) - log_sum * p2, mask=mask)  # [BLOCK_N]
        mean = (x_exp + x * e) / s0
        spread = (xx_exp + x * (x * e)) / s0 - mean * mean
        tl.store(at + 8 * field, tl.where(spread < 0.0, 0.0, spread), mask=mask)  # [BLOCK_N]
    if SURROGATE:
        store_surrogate(
            coefficient, totals, block, rows, mask, logp, entropy, sequence_ids, valid, old_logp, scale, advantages, rewards,
            thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
        )  # fmt: skip


def statistics_of(out: Tensor, *, entropy: bool) -> RowStatistics:
    """The rows of ``out`` by name. entropy: whether the kernel wrote entropy and mean_shifted."""
    logp, lse, row_max, log_sum, *more = out
    two, moments = more[:2] if entropy else (None, None), more[2:]
    return RowStatistics(logp, two[0], lse, row_max, log_sum, two[1], *moments)


def finalize(
    partial: PartialSums, terms: SurrogateTerms | None = None, *, tile: Tile | None = None
) -> tuple[Launch, Finalized]:
    """The launch that computes statistics, and with ``terms`` loss terms; and its outputs."""
    sums, entropy, second_moments = partial.values, partial.entropy, partial.second_moments
    n_rows = sums.shape[2]
    tile = tile or tiles.find("finalize", family(sums.device), 4)
    programs = cdiv(n_rows, tile.block_n)
    out = sums.new_empty(9 if second_moments else 6 if entropy else 4, n_rows)
    arguments = surrogate_arguments(terms, sums, programs, n_rows) | {
        "out": out, "sums": sums, "n_rows": n_rows, "n_splits": partial.splits, "BLOCK_N": tile.block_n,
        "ENTROPY": entropy, "SECOND_MOMENTS": second_moments,
    }  # fmt: skip
    launch = Launch(finalize_kernel, programs, arguments, options(tile), sums.device)
    return launch, Finalized(lambda: statistics_of(out, entropy=entropy), arguments["coefficient"], arguments["totals"])
