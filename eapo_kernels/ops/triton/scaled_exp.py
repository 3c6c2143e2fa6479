"""Scaled exponentials (E11, E12): a one-pass chunk that stores E = e^(z - k) instead of logits.

The offset k of a row is known before the product (``row_offsets``), so the product tracks no
maximum and rescales nothing. E is an operand of the gradient products as it is: no kernel passes
over the chunk again. The file follows the order of the launches: offsets, product, rescue of the
rows whose sum is out of range, statistics; then the chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..chunking import cdiv
from ..dispatch import Coefficients, Entries, LogitCotangents, LogitGradient, RowStatistics, SurrogateTerms
from ..lm_head import Projection, describable
from . import scaled_exp_shard, tiles
from .sparse import dot_rows
from .surrogate import Finalized, store_surrogate, surrogate_arguments
from .tiles import Tile

from .common import (  # isort: skip
    LN2, LOG2E, LOWEST, NEG_INF, PER_CALL, Launch, family, group_order, log1p, options, product_arguments, product_tile,
    raw_logits, round_to, row_scale, shape_logits, slots, split_columns, tile_count, tile_has_target_or_tail, workspace,
)  # fmt: skip


class Window(NamedTuple):
    """Where E lies in its dtype's range (docs/math.md, "The range of k" and "In fp16").

    S is a row's sum of E with the target. A row whose S is out of range is rescued.
    """

    with_guess: float  # log2 S if the ``logp_guess`` is exact
    without_guess: float  # log2 of the target's own E in a row without a ``logp_guess``
    peak: float  # log2 of the largest E of a rescued row
    least: float  # S is in range above it
    most: float  # and below it
    largest: float | None  # bound of a column tile's sum, so that each E in it is finite; None: no bound


_WIDE = Window(with_guess=0.0, without_guess=0.0, peak=0.0, least=2.0**-48, most=2.0**48, largest=None)
_FP16 = Window(with_guess=8.0, without_guess=1.0, peak=8.0, least=1.0, most=2.0**48, largest=65504.0)


def window(dtype: torch.dtype) -> Window:
    """The window of E stored in ``dtype``; 48 bits (33 nats) either way, except in fp16."""
    return _FP16 if dtype == torch.float16 else _WIDE


class ScaledExpSums(NamedTuple):
    """Offsets and partial sums of E_v = 2^x_v, with x_v = z_v / log(2) - k in bits.

    Rows of ``offsets``: k (bits); the target's y_y as in ``common``, at most LOWEST where z_y is
    -inf. Of ``values``: sum E over a tile's columns without the target; for the entropy, sum x E.
    """

    offsets: Tensor  # [2, N] fp32
    values: Tensor  # [1 or 2, column tiles, N] fp32
    block_v: int  # columns of a tile
    rescue_ids: Tensor  # [N] int32; the first ``n_rescue`` are the rescued rows, in any order
    n_rescue: Tensor  # [1] int32

    @staticmethod
    def empty(projection: Projection, entropy: bool, *, tile: Tile | None = None) -> ScaledExpSums:
        """Uninitialized sums for the tile of ``scaled_exp_gemm``."""
        block_v = (tile or product_tile("scaled_exp_gemm", projection)).block_v
        n_rows, new = projection.n_rows, projection.hidden.new_empty
        offsets = new(2, n_rows, dtype=torch.float32)
        values = new(1 + entropy, cdiv(projection.vocab, block_v), n_rows, dtype=torch.float32)
        return ScaledExpSums(offsets, values, block_v, new(n_rows, dtype=torch.int32), new(1, dtype=torch.int32))

    @property
    def entropy(self) -> bool:
        return self.values.shape[0] == 2


@triton.jit(do_not_specialize=PER_CALL)
def row_offsets_kernel(
    offsets, n_rescue, logp_guess, with_guess, without_guess, hidden, weight, bias, targets, row_inv_temperature, scale,
    n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fill ``offsets`` [2, n_rows] of ``ScaledExpSums``, in fp32, and set n_rescue to 0.

    logp_guess: [n_rows] fp32 or None; a value that is not finite counts as no guess.
    with_guess, without_guess: see ``Window``. hidden: [n_rows, dim]. weight: [n_columns, dim].
    targets: [n_rows] int64.
    """
    if tl.program_id(0) == 0:
        tl.store(n_rescue, 0)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    target = tl.load(targets + rows)  # [BLOCK_N]
    outside = (target < 0) | (target >= n_columns)  # the row becomes NaN
    target = tl.where(outside, 0, target)
    y = dot_rows(
        hidden, weight, rows, target, dim, hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, BLOCK_N, BLOCK_D
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + target * bias_stride).to(tl.float32)  # [BLOCK_N]
        y = tl.where(y < LOWEST, LOWEST, y)
    y = tl.where(outside, float("nan"), y)
    below = tl.zeros([BLOCK_N], tl.float32) + without_guess
    if logp_guess is not None:
        given = tl.load(logp_guess + rows)  # [BLOCK_N]
        below = tl.where(tl.abs(given) < float("inf"), given * LOG2E + with_guess, below)
    k = tl.fma(y, row_scale(row_inv_temperature, scale, rows) * LOG2E, -below)
    k = tl.where(y <= LOWEST, float("inf"), k)  # E = 0, so the row is rescued
    tl.store(offsets + rows, k, mask=mask)  # [BLOCK_N]
    tl.store(offsets + n_rows + rows, y, mask=mask)  # [BLOCK_N]


def row_offsets(
    projection: Projection, targets: Tensor, logp_guess: Tensor | None, sums: ScaledExpSums, *, tile: Tile | None = None
) -> Launch:
    """The launch that fills ``sums.offsets``. targets: [N] int64. logp_guess: [N] fp32 or None."""
    hidden, limits = projection.hidden, window(projection.operand_dtype)
    tile = tile or tiles.find("row_offsets", family(hidden.device), hidden.element_size())
    arguments = projection.arguments | {
        "offsets": sums.offsets, "n_rescue": sums.n_rescue, "targets": targets.contiguous(),
        "logp_guess": None if logp_guess is None else logp_guess.contiguous(), "with_guess": limits.with_guess,
        "without_guess": limits.without_guess, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
    }  # fmt: skip
    return Launch(row_offsets_kernel, cdiv(projection.n_rows, tile.block_n), arguments, options(tile), hidden.device)


@triton.jit
def store_slice(
    matrix, matrix_stride, x, sum_exp, x_exp, target, first_row, rows, exists, first_column, n_columns,
    BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, EDGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``store_exponentials`` of x [BLOCK_N, BLOCK_V], cut off at the matrix's last row and column.

    STORE: by descriptor at ``first_row``; else by pointers to ``rows``, masked by ``exists``.
    EDGE: the tile may hold a row's target or reach behind the last column.
    """
    if EDGE:
        column = tl.arange(0, BLOCK_V)[None, :]
        out = (column == (target - first_column)[:, None]) | (column >= n_columns - first_column)
        e = tl.where(out, 0.0, tl.exp2(x))
    else:
        e = tl.exp2(x)
    sum_exp += tl.sum(e, 1)
    if ENTROPY:
        x_exp += tl.sum(x * e, 1)
    if STORE:
        matrix.store([first_row, first_column], round_to(e, matrix.dtype, WIDEN))  # [BLOCK_N, BLOCK_V]
    else:
        columns = first_column + tl.arange(0, BLOCK_V)
        mask = exists[:, None] & (columns < n_columns)[None, :] if EDGE else exists[:, None]
        at = matrix + rows[:, None] * matrix_stride + columns[None, :]
        tl.store(at, round_to(e, matrix.dtype.element_ty, WIDEN), mask=mask)  # [BLOCK_N, BLOCK_V]
    return sum_exp, x_exp


@triton.jit
def store_exponentials(
    matrix, matrix_stride, raw, bias, bias_stride, sum_exp, x_exp, target, scale2, offset, first_row, rows, exists,
    first_column, n_columns, BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Write 2^x of a tile, 0 for the target; return (sum_exp + sum 2^x, x_exp + sum x 2^x).

    x = scale2 * y - offset in bits by one fused multiply-add: only the result is rounded, so a
    large offset costs no precision. For branches and SLICES see ``online_softmax_update``.
    """
    if SLICES == 1:
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1)
        y, _ = shape_logits(raw, bias, bias_stride, columns, None)
        x = tl.fma(y, scale2[:, None], -offset[:, None])
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            sum_exp, x_exp = store_slice(
                matrix, matrix_stride, x, sum_exp, x_exp, target, first_row, rows, exists, first_column, n_columns,
                BLOCK_V, ENTROPY, STORE, True, WIDEN,
            )  # fmt: skip
        else:
            sum_exp, x_exp = store_slice(
                matrix, matrix_stride, x, sum_exp, x_exp, target, first_row, rows, exists, first_column, n_columns,
                BLOCK_V, ENTROPY, STORE, False, WIDEN,
            )  # fmt: skip
    else:
        halves = split_columns(raw, BLOCK_V)
        for i in tl.static_range(2):
            sum_exp, x_exp = store_exponentials(
                matrix, matrix_stride, halves[i], bias, bias_stride, sum_exp, x_exp, target, scale2, offset, first_row, rows,
                exists, first_column + i * (BLOCK_V // 2), n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY, STORE, WIDEN,
            )  # fmt: skip
    return sum_exp, x_exp


@triton.jit(do_not_specialize=PER_CALL)
def scaled_exp_gemm_kernel(
    matrix, sums, offsets, rescue_ids, n_rescue, hidden, weight, bias, targets, row_inv_temperature, scale,
    n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, matrix_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    SLICES: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Store E and each tile's sums. Program i computes tiles i, i + programs, ... in grouped order.

    matrix: [n_rows, n_columns]; with STORE a descriptor of blocks [BLOCK_N, BLOCK_V / SLICES].
    sums: ``ScaledExpSums.values``, each element written once. offsets: k is read.
    rescue_ids, n_rescue: None, or only the rows ``rescue_ids[:n_rescue[0]]`` are computed and
        written; their hidden is gathered, so without DESCRIPTORS and STORE.
    FLATTEN: pipeline across tiles, so that loads of a tile start before the previous epilogue.
    The others: see ``raw_logits``, ``shape_logits`` and ``row_scale``.
    """
    todo = n_rows if rescue_ids is None else tl.load(n_rescue)
    row_tiles, column_tiles = tl.cdiv(todo, BLOCK_N), tl.cdiv(n_columns, BLOCK_V)
    field = tl.cast(column_tiles, tl.int64) * n_rows
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = group_order(tile, row_tiles, column_tiles, GROUP_N)
        first_row, first = row_tile * BLOCK_N, column_tile * BLOCK_V
        raw = raw_logits(
            hidden, weight, first_row, first, todo, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v,
            weight_stride_d, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN, rescue_ids,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_N)
        exists = rows < todo
        rows = tl.minimum(rows, todo - 1)
        if rescue_ids is not None:
            rows = tl.load(rescue_ids + rows)  # [BLOCK_N]
        rows = rows.to(tl.int64)
        sum_exp, x_exp = store_exponentials(
            matrix, matrix_stride, raw, bias, bias_stride, tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32),
            tl.load(targets + rows).to(tl.int32), row_scale(row_inv_temperature, scale, rows) * LOG2E, tl.load(offsets + rows),
            first_row, rows, exists, first, n_columns, BLOCK_V, SLICES, ENTROPY, STORE, WIDEN,
        )  # fmt: skip
        at = sums + tl.cast(column_tile, tl.int64) * n_rows + rows
        tl.store(at, sum_exp, mask=exists)  # [BLOCK_N]
        if ENTROPY:
            tl.store(at + field, x_exp, mask=exists)  # [BLOCK_N]


def scaled_exp_gemm(
    projection: Projection, targets: Tensor, sums: ScaledExpSums, matrix: Tensor, *,
    rescue_ids: bool = False, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """The launch that fills ``matrix`` [N, V] with E and ``sums.values``, from ``sums.offsets``.

    targets: [N] int64 in [0, V). matrix: contiguous rows, in the dtype of the gradient products.
    rescue_ids: only the rows in ``sums.rescue_ids``, gathered, with the first product's columns per
        tile, whose sums are overwritten. tile: instead of the table's.
    """
    assert projection.softcap is None
    assert matrix.stride(1) == 1
    if tile is None:
        tile = product_tile("scaled_exp_rescue" if rescue_ids else "scaled_exp_gemm", projection)
        tile = replace(tile, block_v=sums.block_v) if rescue_ids and tile.block_v != sums.block_v else tile
    assert tile.block_v == sums.block_v
    store = tile.stores and describable(matrix)
    arguments = product_arguments(projection, tile) | {
        "matrix": TensorDescriptor.from_tensor(matrix, [tile.block_n, tile.block_v // tile.slices]) if store else matrix,
        "matrix_stride": matrix.stride(0), "sums": sums.values, "offsets": sums.offsets, "targets": targets.contiguous(),
        "rescue_ids": sums.rescue_ids if rescue_ids else None, "n_rescue": sums.n_rescue if rescue_ids else None,
        "SLICES": tile.slices, "ENTROPY": sums.entropy, "STORE": store, "FLATTEN": tile.persistent,
    }  # fmt: skip
    device, grid = projection.hidden.device, tile_count(projection, tile)
    if tile.persistent or rescue_ids:
        grid = min(grid, slots(device, tile))
    return Launch(scaled_exp_gemm_kernel, grid, arguments, options(tile), device)


@triton.jit
def merge_tiles(
    sums, rows, n_rows, n_tiles, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, shift=None, LARGEST: tl.constexpr = False
):
    """sum E over the column tiles of ``ScaledExpSums.values``, [BLOCK_N], in a fixed order.

    BLOCK_V: tiles per step. shift: None, or [BLOCK_N]: sum (x - shift) E instead.
    LARGEST: the largest sum E of a tile instead; no E but the target's is larger.
    """
    field = tl.cast(n_tiles, tl.int64) * n_rows
    total = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for first in range(0, n_tiles, BLOCK_V):
        tiles = first + tl.arange(0, BLOCK_V)
        at, mask = sums + tiles[:, None].to(tl.int64) * n_rows + rows[None, :], (tiles < n_tiles)[:, None]
        part = tl.load(at, mask=mask, other=0.0)  # [BLOCK_V, BLOCK_N]
        if shift is not None:
            part = tl.fma(part, -shift[None, :], tl.load(at + field, mask=mask, other=0.0))  # [BLOCK_V, BLOCK_N]
        total = tl.maximum(total, part) if LARGEST else total + part
    return tl.max(total, 0) if LARGEST else tl.sum(total, 0)


@triton.jit(do_not_specialize=PER_CALL)
def collect_rescue_ids_kernel(
    rescue_ids, n_rescue, offsets, sums, over_ranks, row_inv_temperature, scale, least, most, largest, n_rows, n_tiles,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Append the rows that are out of range to ``rescue_ids``, and set their offset to -inf.

    least, most, largest: see ``Window``; a sum of NaN is out of range. The order of the ids depends
    on the scheduling of the programs; the rescued rows' results do not.
    over_ranks: [n_rows] fp32, sum E over the columns of all ranks, or None for those in ``sums``.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    if over_ranks is None:
        sum_exp = merge_tiles(sums, safe_rows, n_rows, n_tiles, BLOCK_N, BLOCK_V)
    else:
        sum_exp = tl.load(over_ranks + safe_rows)  # [BLOCK_N]
    k = tl.load(offsets + safe_rows)  # [BLOCK_N]
    y = tl.load(offsets + n_rows + safe_rows)  # [BLOCK_N]
    total = sum_exp + tl.exp2(tl.fma(y, row_scale(row_inv_temperature, scale, safe_rows) * LOG2E, -k))
    in_range = (total > least) & (total < most)
    if largest is not None:
        in_range = in_range & (merge_tiles(sums, safe_rows, n_rows, n_tiles, BLOCK_N, BLOCK_V, LARGEST=True) <= largest)
    rescued = (mask & (in_range == 0)).to(tl.int32)
    count = tl.sum(rescued, 0)
    if count > 0:
        index = tl.arange(0, BLOCK_N)
        place = tl.atomic_add(n_rescue, count) + tl.sum(tl.where(index[None, :] < index[:, None], rescued[None, :], 0), 1)
        tl.store(rescue_ids + place, rows, mask=rescued > 0)  # [BLOCK_N]
        tl.store(offsets + rows, NEG_INF, mask=rescued > 0)  # [BLOCK_N]


@triton.jit(do_not_specialize=PER_CALL)
def row_maxima_kernel(
    offsets, rescue_ids, n_rescue, peak, hidden, weight, bias, row_inv_temperature, scale, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """offsets[row] = max_v z_v / log(2) - ``peak`` for each row in ``rescue_ids``, or -inf.

    A row without a finite logit has -inf. The maximum includes the target; it is exact, so it does
    not depend on the order of the atomics. The rest: see ``scaled_exp_gemm_kernel``.
    """
    todo = tl.load(n_rescue)
    row_tiles, column_tiles = tl.cdiv(todo, BLOCK_N), tl.cdiv(n_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = group_order(tile, row_tiles, column_tiles, GROUP_N)
        first_row, first = row_tile * BLOCK_N, column_tile * BLOCK_V
        raw = raw_logits(
            hidden, weight, first_row, first, todo, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v,
            weight_stride_d, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN, rescue_ids,
        )  # fmt: skip
        columns = first + tl.arange(0, BLOCK_V)
        y, _ = shape_logits(raw, bias, bias_stride, tl.minimum(columns, n_columns - 1), None)
        top = tl.max(tl.where((columns < n_columns)[None, :], y, LOWEST), 1)
        places = first_row + tl.arange(0, BLOCK_N)
        rows = tl.load(rescue_ids + tl.minimum(places, todo - 1)).to(tl.int64)  # [BLOCK_N]
        k = tl.where(top <= LOWEST, NEG_INF, top * (row_scale(row_inv_temperature, scale, rows) * LOG2E) - peak)
        tl.atomic_max(offsets + rows, k, mask=places < todo)


def collect_rescue_ids(
    projection: Projection, sums: ScaledExpSums, *, over_ranks: Tensor | None = None, tile: Tile | None = None
) -> Launch:
    """The launch that fills ``sums.rescue_ids``. over_ranks: of ``sum_over_ranks``."""
    device, limits = projection.hidden.device, window(projection.operand_dtype)
    tile = tile or tiles.find("collect_rescue_ids", family(device), 4)
    arguments = projection.arguments | {
        "rescue_ids": sums.rescue_ids, "n_rescue": sums.n_rescue, "offsets": sums.offsets, "sums": sums.values,
        "over_ranks": over_ranks, "least": limits.least, "most": limits.most, "largest": limits.largest,
        "n_tiles": sums.values.shape[1], "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v,
    }  # fmt: skip
    return Launch(collect_rescue_ids_kernel, cdiv(projection.n_rows, tile.block_n), arguments, options(tile), device)


def row_maxima(projection: Projection, sums: ScaledExpSums, *, tile: Tile | None = None) -> Launch:
    """The launch that sets the offset of each rescued row to its maximum less ``Window.peak``."""
    device, peak = projection.hidden.device, window(projection.operand_dtype).peak
    tile = tile or product_tile("row_maxima", projection)
    arguments = product_arguments(projection, tile) | {
        "offsets": sums.offsets, "rescue_ids": sums.rescue_ids, "n_rescue": sums.n_rescue, "peak": peak,
    }  # fmt: skip
    return Launch(row_maxima_kernel, min(tile_count(projection, tile), slots(device, tile)), arguments, options(tile), device)


def rescue(projection: Projection, targets: Tensor, sums: ScaledExpSums, matrix: Tensor) -> None:
    """Recompute E and sums of the rows out of range, with their maximum as the offset.

    Three launches and no synchronization: the last two read the number of rows on the device.
    """
    split, limits = projection.shard is not None, window(projection.operand_dtype)
    over_ranks = scaled_exp_shard.sum_over_ranks(projection, sums, limits) if split else None
    collect_rescue_ids(projection, sums, over_ranks=over_ranks)()
    row_maxima(projection, sums)()
    if split:
        scaled_exp_shard.mark_empty(sums)
    scaled_exp_gemm(projection, targets, sums, matrix, rescue_ids=True)()


@triton.jit(do_not_specialize=PER_CALL)
def scaled_exp_finalize_kernel(
    out, sums, offsets, row_inv_temperature, slope, n_rows, n_tiles, coefficient, totals, sequence_ids, valid, old_logp, scale,
    advantages, rewards, thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Statistics of a block of tokens (E13), and with SURROGATE its loss terms.

    ``sum_exp`` is R and ``total`` is S of E13. A row without a finite logit gives NaN.

    out: [6 or 8, n_rows] fp32: logp, lse, k + c (nats), log_sum, factor, target, then entropy and
        mean_shifted. factor = -slope / S and target = slope R / S, times the cotangent of logp, are
        the row scale of E and the target's entry of the gradient (E12).
    slope: dz / d(hidden @ weight.T) without the row's own inverse temperature.
    n_tiles: column tiles in ``sums``. From ``coefficient`` on: see ``store_surrogate``.
    """
    block = tl.program_id(0)
    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)
    field = tl.cast(n_rows, tl.int64)
    sum_exp = merge_tiles(sums, rows, n_rows, n_tiles, BLOCK_N, BLOCK_V)
    k = tl.load(offsets + rows)  # [BLOCK_N]
    y = tl.load(offsets + field + rows)  # [BLOCK_N]
    factor = row_scale(row_inv_temperature, slope, rows)
    bits = tl.where(y <= LOWEST, NEG_INF - k, tl.fma(y, factor * LOG2E, -k))  # NaN if every logit is -inf
    e = tl.exp2(bits)
    total = sum_exp + e
    c = tl.floor(tl.log2(total) + 0.5)
    unit = tl.exp2(-c)
    x = (bits - c) * LN2
    confident = sum_exp <= e
    excess = log1p(sum_exp / tl.where(confident, e, 1.0))
    log_sum = tl.where(confident, x + excess, tl.log(total * unit))
    logp = tl.where(confident, -excess, x - log_sum)
    centre = k + c
    moved = centre - k
    lost = (k - (centre - moved)) + (c - moved)  # the rounding error of k + c
    offset = centre * LN2
    fitted = log_sum + (tl.fma(centre, LN2, -offset) + lost * LN2)  # relative to the rounded offset that is stored
    at = out + rows
    tl.store(at, logp, mask=mask)  # [BLOCK_N]
    tl.store(at + field, tl.where(confident, y * factor - logp, offset + fitted), mask=mask)  # [BLOCK_N]
    tl.store(at + 2 * field, offset, mask=mask)  # [BLOCK_N]
    tl.store(at + 3 * field, fitted, mask=mask)  # [BLOCK_N]
    tl.store(at + 4 * field, -factor / total, mask=mask)  # [BLOCK_N]
    tl.store(at + 5 * field, factor * (sum_exp / total), mask=mask)  # [BLOCK_N]
    entropy = tl.zeros([BLOCK_N], tl.float32)
    if ENTROPY:
        x_exp = merge_tiles(sums, rows, n_rows, n_tiles, BLOCK_N, BLOCK_V, c) * LN2
        x = tl.where(e > 0.0, x, 0.0)  # x e^x -> 0 at x = -inf
        entropy = tl.where(confident, excess - (x_exp - x * sum_exp) / total, log_sum - (x_exp + x * e) / total)
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(at + 6 * field, entropy, mask=mask)  # [BLOCK_N]
        tl.store(at + 7 * field, fitted - entropy, mask=mask)  # [BLOCK_N]
    if SURROGATE:
        store_surrogate(
            coefficient, totals, block, rows, mask, logp, entropy, sequence_ids, valid, old_logp, scale, advantages, rewards,
            thresholds, positive_weight, negative_weight, ratio_low, ratio_high, dual_clip,
        )  # fmt: skip


def scaled_exp_finalize(
    projection: Projection, sums: ScaledExpSums, terms: SurrogateTerms | None = None, *, tile: Tile | None = None
) -> tuple[Launch, Finalized, Tensor]:
    """The launch, its outputs, and [2, N] fp32: ``factor`` and ``target`` of the kernel.

    ``row_offset`` of the statistics is k + c, not the maximum. The launch changes none of its
    inputs, so it may run again with other terms.
    """
    n_rows, device = projection.n_rows, projection.hidden.device
    tile = tile or tiles.find("scaled_exp_finalize", family(device), 4)
    programs = cdiv(n_rows, tile.block_n)
    out = sums.offsets.new_empty(8 if sums.entropy else 6, n_rows)
    arguments = projection.arguments | surrogate_arguments(terms, out, programs, n_rows) | {
        "out": out, "sums": sums.values, "offsets": sums.offsets, "n_tiles": sums.values.shape[1],
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "ENTROPY": sums.entropy,
    }  # fmt: skip

    def statistics() -> RowStatistics:
        logp, lse, offset, log_sum, _, _, *moments = out
        entropy, mean = moments or (None, None)
        return RowStatistics(logp, entropy, lse, offset, log_sum, mean)

    final = Finalized(statistics, arguments["coefficient"], arguments["totals"])
    return Launch(scaled_exp_finalize_kernel, programs, arguments, options(tile), device), final, out[4:6]


class ScaledExpKernels(NamedTuple):
    """The first product and its sums; another backend may bring its own with the same outputs."""

    sums: Callable[[Projection, bool], ScaledExpSums] = ScaledExpSums.empty  # (projection, entropy): with the product's tiles
    product: Callable[..., Callable[[], None]] = scaled_exp_gemm  # called as ``scaled_exp_gemm``


class ScaledExpChunk:
    """See ``dispatch.Chunk``. No logit is stored, so the gradient is that of logp alone."""

    def __init__(
        self, projection: Projection, targets: Tensor, logp_guess: Tensor | None, *,
        entropy: bool, kernels: ScaledExpKernels | None = None,
    ) -> None:  # fmt: skip
        kernels, shard = kernels or ScaledExpKernels(), projection.shard
        self._projection, self._targets = projection, targets
        self.sums = kernels.sums(projection, entropy)
        self._matrix: Tensor | None = workspace(projection, projection.operand_dtype)
        row_offsets(projection, targets, logp_guess, self.sums)()
        if shard is not None:
            scaled_exp_shard.share_offsets(projection, targets, logp_guess, self.sums, window(projection.operand_dtype))
        kernels.product(projection, targets, self.sums, self._matrix)()
        rescue(projection, targets, self.sums, self._matrix)
        self._gathered = self.sums if shard is None else scaled_exp_shard.gather_sums(shard, self.sums)
        self._final: tuple[Finalized, Tensor] | None = None

    def _finalize(self, terms: SurrogateTerms | None) -> tuple[Finalized, Tensor]:
        """Outputs of ``scaled_exp_finalize``; without ``terms`` those of an earlier call."""
        if self._final is None or terms is not None:
            launch, final, factors = scaled_exp_finalize(self._projection, self._gathered, terms)
            launch()
            if self._projection.shard is not None:
                factors = scaled_exp_shard.fit_factors(factors, self._targets, self.sums, self._gathered, final.statistics())
            self._final = final, factors
        return self._final

    def statistics(self) -> RowStatistics:
        """One launch. ``row_offset`` is near lse, not the row's maximum."""
        return self._finalize(None)[0].statistics()

    def surrogate(self, terms: SurrogateTerms) -> Coefficients:
        """One launch."""
        return self._finalize(terms)[0].coefficients()

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        """No pass over the matrix: its factors are the cotangent times those of the finalize."""
        assert self._matrix is not None, "gradient: expected one call per chunk, got a second one"
        assert cotangents.logp is not None
        assert (cotangents.entropy, cotangents.lse) == (None, None)
        matrix, self._matrix = self._matrix, None
        row_scale, at_target = (cotangents.logp * self._finalize(None)[1]).unbind()
        return LogitGradient(matrix, row_scale, Entries.one_a_row(self._targets, at_target))
