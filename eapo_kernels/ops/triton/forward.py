"""Statistics without logits (E3, E4): each program walks a range of the vocabulary for a tile of tokens, with running sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..projection import Projection
from . import configs
from .configs import Tile
from .launch import Launch, options, product_arguments, product_tile, slots, transform_arguments
from .math import LOG2E, LOWEST, online_softmax_update, row_scale
from .product import group_order, raw_logits
from .sums import PartialSums, store_sums


@triton.jit(do_not_specialize=["n_rows", "n_splits", "tiles_per_split"])
def stream_statistics_kernel(
    sums, hidden, weight, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, n_splits, tiles_per_split,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of rows over ``tiles_per_split`` vocabulary tiles, without the target's logit, which is kept apart.

    sums: see ``PartialSums``. targets: [n_rows] int64 in [0, n_columns). The others: see ``product.raw_logits`` and
    ``math.shape_logits``. One program per row tile and vocabulary range; every element of ``sums`` has one owner.
    """
    row_tile, split = group_order(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), n_splits, GROUP_N)
    first_row = row_tile * BLOCK_N
    rows = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)
    safe_rows = tl.minimum(rows, n_rows - 1)
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    factor = row_scale(row_inv_temperature, scale, safe_rows)
    y_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    y_target = tl.zeros([BLOCK_N], tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
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
        y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
            raw, bias, bias_stride, cap, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, target, first, n_columns,
            factor * LOG2E, BLOCK_V, SLICES, ENTROPY, SECOND_MOMENTS,
        )  # fmt: skip
    store_sums(
        sums, rows, n_rows, split, n_splits, factor, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, ENTROPY, SECOND_MOMENTS
    )


def stream_statistics(
    projection: Projection,
    targets: Tensor,
    *,
    entropy: bool,
    second_moments: bool,
    budget: int,
    tile: Tile | None = None,
    splits: int | None = None,
) -> tuple[Launch, PartialSums]:
    """The launch that fills the sums of every row, and the sums, which take at most ``budget`` bytes (one range if need be).

    targets: [N] int64 in [0, V). tile, splits: instead of the table's tile and the number of ranges that fills the device.
    """
    tile = tile or product_tile("stream_statistics", projection)
    row_tiles, column_tiles = triton.cdiv(projection.n_rows, tile.block_n), triton.cdiv(projection.vocab, tile.block_v)
    if splits is None:
        most = budget // (4 * PartialSums.fields(entropy, second_moments) * projection.n_rows)
        length = configs.tiles_per_split(row_tiles, column_tiles, slots(projection.hidden.device, tile), most)
    else:
        length = triton.cdiv(column_tiles, splits)
    splits = triton.cdiv(column_tiles, length)
    sums = PartialSums.empty(projection, splits, entropy, second_moments)
    arguments = {
        "sums": sums.values,
        "targets": targets.contiguous(),
        "n_splits": splits,
        "tiles_per_split": length,
        "ENTROPY": entropy,
        "SECOND_MOMENTS": second_moments,
        "SLICES": tile.slices,
    }
    arguments |= product_arguments(projection, tile) | transform_arguments(projection)
    launch = Launch(stream_statistics_kernel, row_tiles * splits, arguments, options(tile), projection.hidden.device)
    return launch, sums
