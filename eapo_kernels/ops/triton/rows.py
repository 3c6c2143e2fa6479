"""The same statistics and gradients from logits that are stored: bound by memory, each logit read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import LogitCotangents
from ..projection import Projection
from ..statistics import RowStatistics
from . import configs
from .backward import gradient_arguments, gradient_coefficients, store_gradient
from .configs import Tile
from .launch import Launch, family, options, transform_arguments
from .math import LOG2E, LOWEST, online_softmax_update, row_scale
from .sums import PartialSums, store_sums


@triton.jit
def load_tile(raw, raw_stride, safe_rows, first_column, BLOCK_V: tl.constexpr):
    """Raw logits [BLOCK_N, BLOCK_V].

    Reads up to the row's stride, whose alignment is known, instead of the last column, so that an odd vocabulary is loaded in
    vectors too; what lies behind the last column means nothing.
    """
    columns = first_column + tl.arange(0, BLOCK_V)
    at = raw + safe_rows[:, None] * raw_stride + columns[None, :]
    return tl.load(at, mask=(columns < raw_stride)[None, :], other=0.0)  # [BLOCK_N, BLOCK_V]


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def row_statistics_kernel(
    sums, raw, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, raw_stride, bias_stride, n_splits,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, ENTROPY: tl.constexpr, SECOND_MOMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of one tile [BLOCK_N, BLOCK_V] of raw logits [n_rows, n_columns] fp32, row stride ``raw_stride``.

    See ``forward.stream_statistics_kernel``; here a vocabulary range is one tile. A row's programs follow each other.
    """
    split = tl.program_id(0) % n_splits
    rows = (tl.program_id(0) // n_splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, n_rows - 1)
    first = split * BLOCK_V
    tile = load_tile(raw, raw_stride, safe_rows, first, BLOCK_V)
    factor = row_scale(row_inv_temperature, scale, safe_rows)
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    zero = tl.zeros([BLOCK_N], tl.float32)
    y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp = online_softmax_update(
        tile, bias, bias_stride, cap, tl.full([BLOCK_N], LOWEST, tl.float32), zero, zero, zero, zero, zero, zero, target, first,
        n_columns, factor * LOG2E, BLOCK_V, 1, ENTROPY, SECOND_MOMENTS,
    )  # fmt: skip
    store_sums(
        sums, rows, n_rows, split, n_splits, factor, y_max, y_target, rest, x_exp, exp2, x_exp2, xx_exp, ENTROPY, SECOND_MOMENTS
    )


@triton.jit(do_not_specialize=["n_rows"])
def row_gradient_kernel(
    out, raw, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, raw_stride, bias_stride, out_stride,
    logp, row_max, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, gain, slope,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of raw logits to its gradient (E6). ``out`` may be ``raw``: each program reads its tile before it writes it.

    Arguments as in ``backward.logit_gradient_kernel``.
    """
    n_tiles = tl.cdiv(n_columns, BLOCK_V)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, n_rows - 1)
    first = tl.program_id(0) % n_tiles * BLOCK_V
    tile = load_tile(raw, raw_stride, safe_rows, first, BLOCK_V)
    alpha, beta, target_value = gradient_coefficients(
        logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, gain,
        row_scale(row_inv_temperature, slope, safe_rows), safe_rows,
    )  # fmt: skip
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    store_gradient(
        out, out_stride, tile, bias, bias_stride, cap, row_scale(row_inv_temperature, scale, safe_rows),
        tl.load(row_max + safe_rows), tl.load(log_sum + safe_rows), alpha, beta, target_value, target,
        rows, n_rows, first, n_columns, BLOCK_V, 1, grad_entropy is not None,
    )  # fmt: skip


def row_statistics(
    raw: Tensor, projection: Projection, targets: Tensor, *, entropy: bool, tile: Tile | None = None
) -> tuple[Launch, PartialSums]:
    """The launch that reduces raw logits [N, V] fp32 to sums, and the sums. targets: [N] int64 in [0, V)."""
    tile = tile or configs.find("row_statistics", family(raw.device), 4)
    splits = triton.cdiv(projection.vocab, tile.block_v)
    sums = PartialSums.empty(projection, splits, entropy, False)
    arguments = transform_arguments(projection) | {
        "sums": sums.values,
        "raw": raw,
        "targets": targets.contiguous(),
        "n_rows": projection.n_rows,
        "n_columns": projection.vocab,
        "raw_stride": raw.stride(0),
        "n_splits": splits,
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "ENTROPY": entropy,
        "SECOND_MOMENTS": False,
    }
    grid = triton.cdiv(projection.n_rows, tile.block_n) * splits
    return Launch(row_statistics_kernel, grid, arguments, options(tile), raw.device), sums


def row_gradient(
    out: Tensor,
    raw: Tensor,
    projection: Projection,
    targets: Tensor,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
    *,
    tile: Tile | None = None,
) -> Launch:
    """The launch that writes dL/draw [N, V] into ``out``, which may be ``raw``."""
    tile = tile or configs.find("row_gradient", family(raw.device), 4)
    arguments = gradient_arguments(projection, targets, statistics, cotangents, None) | {
        "out": out,
        "raw": raw,
        "n_rows": projection.n_rows,
        "n_columns": projection.vocab,
        "raw_stride": raw.stride(0),
        "out_stride": out.stride(0),
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
    }
    grid = triton.cdiv(projection.n_rows, tile.block_n) * triton.cdiv(projection.vocab, tile.block_v)
    return Launch(row_gradient_kernel, grid, arguments, options(tile), out.device)
