"""The scaled-exponential form's first product (E11): hidden @ weight.T whose epilogue stores E = e^(z - k) in the operands' dtype and sums it.

k is one offset per row, known before the product (``offsets.py``), so that no maximum is tracked, nothing is rescaled, and E is
a plain operand of the gradient products. For a row's own target 0 is stored and nothing is summed: see ``scaled_exp_finalize``.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..projection import Projection
from .configs import Tile
from .launch import Launch, describable, options, product_arguments, product_tile, slots, transform_arguments
from .math import LOG2E, round_to, row_scale, shape_logits, split_columns, tile_has_target_or_tail
from .offsets import ScaledExpSums
from .product import group_order, raw_logits


@triton.jit
def store_slice(
    matrix, matrix_stride, e, first_row, rows, exists, first_column, n_columns,
    BLOCK_V: tl.constexpr, STORE: tl.constexpr, EDGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write [BLOCK_N, BLOCK_V] numbers in the dtype of ``matrix``, cut off at the last row and column.

    STORE: by descriptor at ``first_row``, else to ``rows`` where they exist. EDGE: columns may lie behind the last.
    """
    if STORE:
        matrix.store([first_row, first_column], round_to(e, matrix.dtype, WIDEN))  # [BLOCK_N, BLOCK_V]
    else:
        columns = first_column + tl.arange(0, BLOCK_V)
        mask = exists[:, None]
        if EDGE:
            mask = mask & (columns < n_columns)[None, :]
        at = matrix + rows[:, None] * matrix_stride + columns[None, :]
        tl.store(at, round_to(e, matrix.dtype.element_ty, WIDEN), mask=mask)  # [BLOCK_N, BLOCK_V]


@triton.jit
def store_exponentials(
    matrix, matrix_stride, raw, bias, bias_stride, rest, x_exp, target, scale2, offset, first_row, rows, exists, first_column,
    n_columns, BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(rest + sum 2^x, x_exp + sum x 2^x) of a tile, x = scale2 * y - offset in bits, and 2^x written (0 for the target).

    One fused multiply-add a logit: only its result is rounded, so a large offset costs no precision. Branches and SLICES as in
    ``math.online_softmax_update``.
    """
    if SLICES == 1:
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1)
        y, _ = shape_logits(raw, bias, bias_stride, columns, None)
        x = tl.fma(y, scale2[:, None], -offset[:, None])
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            column = tl.arange(0, BLOCK_V)[None, :]
            out = (column == (target - first_column)[:, None]) | (column >= n_columns - first_column)
            e = tl.where(out, 0.0, tl.exp2(x))
            rest += tl.sum(e, 1)
            if ENTROPY:
                x_exp += tl.sum(x * e, 1)
            store_slice(matrix, matrix_stride, e, first_row, rows, exists, first_column, n_columns, BLOCK_V, STORE, True, WIDEN)
        else:
            e = tl.exp2(x)
            rest += tl.sum(e, 1)
            if ENTROPY:
                x_exp += tl.sum(x * e, 1)
            store_slice(
                matrix, matrix_stride, e, first_row, rows, exists, first_column, n_columns, BLOCK_V, STORE, False, WIDEN
            )
    else:
        left, right = split_columns(raw, BLOCK_V)
        rest, x_exp = store_exponentials(
            matrix, matrix_stride, left, bias, bias_stride, rest, x_exp, target, scale2, offset, first_row, rows, exists,
            first_column, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY, STORE, WIDEN,
        )  # fmt: skip
        rest, x_exp = store_exponentials(
            matrix, matrix_stride, right, bias, bias_stride, rest, x_exp, target, scale2, offset, first_row, rows, exists,
            first_column + BLOCK_V // 2, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY, STORE, WIDEN,
        )  # fmt: skip
    return rest, x_exp


@triton.jit(do_not_specialize=["n_rows"])
def scaled_exp_gemm_kernel(
    matrix, sums, offsets, rescue_ids, n_rescue, hidden, weight, bias, targets, row_inv_temperature, scale,
    n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, matrix_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    SLICES: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Programs walk over the tiles of [n_rows, n_columns] in grouped order, as many apart as there are programs.

    matrix: [n_rows, n_columns], row stride ``matrix_stride``; with STORE a descriptor of blocks [BLOCK_N, BLOCK_V / SLICES].
    sums: [1 or 2, column tiles, n_rows] fp32, see ``offsets.ScaledExpSums``; every element has one owner.
    offsets: [2, n_rows] fp32, of which the first row is read: k in bits.
    rescue_ids, n_rescue: None, or [n_rows] int32 of which the first ``n_rescue[0]`` name the rows to be done; the others are left
    alone (their hidden is gathered: no DESCRIPTORS, no STORE).
    FLATTEN: one pipeline over all tiles of a program, so that a tile's loads start before its predecessor's epilogue.
    The others: see ``product.raw_logits`` and ``math.shape_logits``.
    """
    todo = n_rows
    if rescue_ids is not None:
        todo = tl.load(n_rescue)
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
        rest, x_exp = store_exponentials(
            matrix, matrix_stride, raw, bias, bias_stride, tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32),
            tl.load(targets + rows).to(tl.int32), row_scale(row_inv_temperature, scale, rows) * LOG2E, tl.load(offsets + rows),
            first_row, rows, exists, first, n_columns, BLOCK_V, SLICES, ENTROPY, STORE, WIDEN,
        )  # fmt: skip
        at = sums + tl.cast(column_tile, tl.int64) * n_rows + rows
        tl.store(at, rest, mask=exists)  # [BLOCK_N]
        if ENTROPY:
            tl.store(at + field, x_exp, mask=exists)  # [BLOCK_N]


def rescue_tile(projection: Projection, sums: ScaledExpSums) -> Tile:
    """The tile for rescue_ids rows, with the columns of the first run: both fill the same sums."""
    return replace(product_tile("scaled_exp_rescue", projection), block_v=sums.block_v)


def scaled_exp_gemm(
    projection: Projection,
    targets: Tensor,
    sums: ScaledExpSums,
    matrix: Tensor,
    *,
    rescue_ids: bool = False,
    tile: Tile | None = None,
) -> Launch:
    """The launch that fills ``matrix`` [N, V] with E and ``sums.values``, from ``sums.offsets``.

    targets: [N] int64 in [0, V). matrix: contiguous rows in the dtype of the gradient products. rescue_ids: only the rows that
    ``sums`` lists as unsound, by gathered loads. tile: instead of the table's.
    """
    assert projection.softcap is None
    assert matrix.stride(1) == 1
    tile = tile or (rescue_tile(projection, sums) if rescue_ids else product_tile("scaled_exp_gemm", projection))
    assert tile.block_v == sums.block_v
    store = tile.stores and describable(matrix)
    arguments = product_arguments(projection, tile) | transform_arguments(projection) | {
        "matrix": TensorDescriptor.from_tensor(matrix, [tile.block_n, tile.block_v // tile.slices]) if store else matrix,
        "matrix_stride": matrix.stride(0),
        "sums": sums.values,
        "offsets": sums.offsets,
        "rescue_ids": sums.rescue_ids if rescue_ids else None,
        "n_rescue": sums.n_rescue if rescue_ids else None,
        "targets": targets.contiguous(),
        "SLICES": tile.slices,
        "ENTROPY": sums.entropy,
        "STORE": store,
        "FLATTEN": tile.persistent,
    }  # fmt: skip
    del arguments["cap"]
    device = projection.hidden.device
    tiles = triton.cdiv(projection.n_rows, tile.block_n) * triton.cdiv(projection.vocab, tile.block_v)
    grid = min(tiles, slots(device, tile)) if tile.persistent or rescue_ids else tiles
    return Launch(scaled_exp_gemm_kernel, grid, arguments, options(tile), device)
