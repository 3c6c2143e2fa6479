"""Rows whose offset was wrong: found on the device, and redone on the device, with their maximum as the offset.

Three launches that nobody waits for: list the rows whose sum is not sound, find the maxima of the rescue_ids rows, and run the
first product again for them. Without such rows the last two leave after reading one number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..projection import Projection
from . import configs
from .configs import Tile
from .launch import Launch, family, options, product_arguments, product_tile, slots, transform_arguments
from .math import LOG2E, LOWEST, NEG_INF, row_scale, shape_logits
from .offsets import ScaledExpSums, window
from .product import group_order, raw_logits
from .scaled_exp_gemm import scaled_exp_gemm
from .scaled_exp_split import mark_empty, sum_everywhere


@triton.jit
def merge_tiles(sums, rows, n_rows, n_tiles, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, shift=None):
    """sum E over the column tiles (``ScaledExpSums.values``), [BLOCK_N], in a fixed order, BLOCK_V tiles at a time.

    With ``shift`` [BLOCK_N]: sum (x - shift) E instead.
    """
    field = tl.cast(n_tiles, tl.int64) * n_rows
    total = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for first in range(0, n_tiles, BLOCK_V):
        tiles = first + tl.arange(0, BLOCK_V)
        at = sums + tiles[:, None].to(tl.int64) * n_rows + rows[None, :]
        mask = (tiles < n_tiles)[:, None]
        part = tl.load(at, mask=mask, other=0.0)  # [BLOCK_V, BLOCK_N]
        if shift is not None:
            part = tl.fma(part, -shift[None, :], tl.load(at + field, mask=mask, other=0.0))  # [BLOCK_V, BLOCK_N]
        total += part
    return tl.sum(total, 0)


@triton.jit
def largest_tile(sums, rows, n_rows, n_tiles, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The largest sum E of a column tile, [BLOCK_N]: no E but the target's is larger. Arguments as in ``merge_tiles``."""
    largest = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
    for first in range(0, n_tiles, BLOCK_V):
        tiles = first + tl.arange(0, BLOCK_V)
        at = sums + tiles[:, None].to(tl.int64) * n_rows + rows[None, :]
        largest = tl.maximum(largest, tl.load(at, mask=(tiles < n_tiles)[:, None], other=0.0))  # [BLOCK_V, BLOCK_N]
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["n_rows"])
def collect_rescue_ids_kernel(
    rescue_ids, n_rescue, offsets, sums, everywhere, row_inv_temperature, scale, least, most, largest, n_rows, n_tiles,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Append the rows that are not sound to ``rescue_ids``, and set their offset to -inf.

    Not sound: the sum of E, with the target, is NaN or not between ``least`` and ``most``, or a column tile's sum is above
    ``largest`` (None: any may be); see ``offsets.Window``. everywhere: [n_rows] fp32, sum E over the columns of all processes
    instead of those in ``sums``, or None.
    The rows' order depends on the hardware, their results do not. The others: see ``offsets.ScaledExpSums``.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    safe_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    if everywhere is None:
        rest = merge_tiles(sums, safe_rows, n_rows, n_tiles, BLOCK_N, BLOCK_V)
    else:
        rest = tl.load(everywhere + safe_rows)  # [BLOCK_N]
    k = tl.load(offsets + safe_rows)  # [BLOCK_N]
    y = tl.load(offsets + n_rows + safe_rows)  # [BLOCK_N]
    total = rest + tl.exp2(tl.fma(y, row_scale(row_inv_temperature, scale, safe_rows) * LOG2E, -k))
    sound = (total > least) & (total < most)
    if largest is not None:
        sound = sound & (largest_tile(sums, safe_rows, n_rows, n_tiles, BLOCK_N, BLOCK_V) <= largest)
    unsound = (mask & (sound == 0)).to(tl.int32)
    count = tl.sum(unsound, 0)
    if count > 0:
        index = tl.arange(0, BLOCK_N)
        place = tl.atomic_add(n_rescue, count) + tl.sum(tl.where(index[None, :] < index[:, None], unsound[None, :], 0), 1)
        tl.store(rescue_ids + place, rows, mask=unsound > 0)  # [BLOCK_N]
        tl.store(offsets + rows, NEG_INF, mask=unsound > 0)  # [BLOCK_N]


@triton.jit(do_not_specialize=["n_rows"])
def row_maxima_kernel(
    offsets, rescue_ids, n_rescue, peak, hidden, weight, bias, row_inv_temperature, scale, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """offsets[row] = max_v z_v in bits, less ``peak``, for every rescue_ids row, the target included; -inf where every logit is.

    Arguments and order of the tiles as in ``scaled_exp_gemm.scaled_exp_gemm_kernel``. A maximum is exact, so atomics do not make it random.
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
    projection: Projection, sums: ScaledExpSums, *, everywhere: Tensor | None = None, tile: Tile | None = None
) -> Launch:
    """The launch that lists the rows to be redone in ``sums``. everywhere: [N] fp32, see ``scaled_exp_split.sum_everywhere``."""
    device, limits = projection.hidden.device, window(projection.operand_dtype)
    tile = tile or configs.find("collect_rescue_ids", family(device), 4)
    transform = transform_arguments(projection)
    arguments = {
        "rescue_ids": sums.rescue_ids,
        "n_rescue": sums.n_rescue,
        "offsets": sums.offsets,
        "sums": sums.values,
        "everywhere": everywhere,
        "row_inv_temperature": transform["row_inv_temperature"],
        "scale": transform["scale"],
        "least": limits.least,
        "most": limits.most,
        "largest": limits.largest,
        "n_rows": projection.n_rows,
        "n_tiles": sums.values.shape[1],
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
    }
    return Launch(collect_rescue_ids_kernel, triton.cdiv(projection.n_rows, tile.block_n), arguments, options(tile), device)


def row_maxima(projection: Projection, sums: ScaledExpSums, *, tile: Tile | None = None) -> Launch:
    """The launch that replaces the offsets of the rescue_ids rows by their maxima, less the window's ``peak``."""
    device = projection.hidden.device
    tile = tile or product_tile("row_maxima", projection)
    arguments = product_arguments(projection, tile) | transform_arguments(projection) | {
        "offsets": sums.offsets,
        "rescue_ids": sums.rescue_ids,
        "n_rescue": sums.n_rescue,
        "peak": window(projection.operand_dtype).peak,
    }  # fmt: skip
    del arguments["cap"]
    tiles = triton.cdiv(projection.n_rows, tile.block_n) * triton.cdiv(projection.vocab, tile.block_v)
    return Launch(row_maxima_kernel, min(tiles, slots(device, tile)), arguments, options(tile), device)


def rescue(projection: Projection, targets: Tensor, sums: ScaledExpSums, matrix: Tensor) -> None:
    """Rewrite E and the sums of the rows whose offset was wrong. Three launches."""
    collect_rescue_ids(projection, sums, everywhere=sum_everywhere(projection, sums))()
    row_maxima(projection, sums)()
    if projection.shard is not None:
        mark_empty(sums)
    scaled_exp_gemm(projection, targets, sums, matrix, rescue_ids=True)()
