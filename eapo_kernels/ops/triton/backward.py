"""dL/d(hidden @ weight.T + bias) for a slab of columns (E6): recompute the logits tile by tile and write their gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..backend import LogitCotangents
from ..projection import Projection
from ..statistics import RowStatistics
from .configs import Tile
from .launch import Launch, options, product_arguments, product_tile, transform_arguments
from .math import LOG2E, expm1, row_scale, shape_logits, split_columns, tile_has_target_or_tail
from .product import group_order, raw_logits


@triton.jit
def gradient_coefficients(logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, gain, slope, rows):
    """(alpha, beta, target), each [BLOCK_N]: the gradient is p_v (alpha - beta x_v) for v != y and ``target`` for v = y (E6).

    logp, log_sum, mean_shifted, grad_*: pointers to [N] fp32; a cotangent that is None is zero, and ``mean_shifted`` is read
    with ``grad_entropy`` only. gain: pointer to a number, or None. slope: [BLOCK_N], dz / d(hidden @ weight.T) without the
    soft-cap's part.
    """
    log_p = tl.load(logp + rows)  # [BLOCK_N]
    p = tl.exp(log_p)
    alpha = tl.zeros(rows.shape, tl.float32)
    beta = tl.zeros(rows.shape, tl.float32)
    target = tl.zeros(rows.shape, tl.float32)
    if grad_logp is not None:
        a = tl.load(grad_logp + rows)  # [BLOCK_N]
        alpha -= a
        target -= a * expm1(log_p)
    if grad_lse is not None:
        g = tl.load(grad_lse + rows)  # [BLOCK_N]
        alpha += g
        target += g * p
    if grad_entropy is not None:
        beta = tl.load(grad_entropy + rows)  # [BLOCK_N]
        mean = tl.load(mean_shifted + rows)  # [BLOCK_N]
        alpha += beta * mean
        x = tl.where(p > 0.0, log_p + tl.load(log_sum + rows), 0.0)  # [BLOCK_N]
        target -= beta * p * (x - mean)
    if gain is not None:
        slope *= tl.load(gain)
    return alpha * slope, beta * slope, target * slope


@triton.jit
def gradient_tile(y, scale, row_max, log_sum, alpha, beta, ENTROPY: tl.constexpr):
    """p_v (alpha - beta x_v), [BLOCK_N, BLOCK_V]; the vectors are [BLOCK_N]."""
    x = tl.fma(y, scale[:, None], -row_max[:, None])
    p = tl.exp2((x - log_sum[:, None]) * LOG2E)
    if ENTROPY:
        p *= alpha[:, None] - beta[:, None] * x
    else:
        p *= alpha[:, None]
    return p


@triton.jit
def store_gradient(
    out, out_stride, raw, bias, bias_stride, cap, scale, row_max, log_sum, alpha, beta, target_value, target,
    rows, n_rows, first_column, n_columns, BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Write a tile's gradient p_v (alpha - beta x_v) times the soft-cap's slope, in the dtype of ``out``.

    The target's column is ``target_value`` times the slope instead. Branches and SLICES as in ``math.online_softmax_update``.
    """
    if SLICES == 1:
        columns = first_column + tl.arange(0, BLOCK_V)
        safe_columns = tl.minimum(columns, n_columns - 1)
        at = out + rows[:, None] * out_stride + columns[None, :]
        exists = (rows < n_rows)[:, None]
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            y, slope = shape_logits(raw, bias, bias_stride, safe_columns, cap)
            gradient = gradient_tile(y, scale, row_max, log_sum, alpha, beta, ENTROPY)
            is_target = tl.arange(0, BLOCK_V)[None, :] == (target - first_column)[:, None]
            gradient = tl.where(is_target, target_value[:, None], gradient) * slope
            tl.store(at, gradient.to(out.dtype.element_ty), mask=exists & (columns < n_columns)[None, :])  # [BLOCK_N, BLOCK_V]
        else:
            y, slope = shape_logits(raw, bias, bias_stride, safe_columns, cap)
            gradient = gradient_tile(y, scale, row_max, log_sum, alpha, beta, ENTROPY) * slope
            tl.store(at, gradient.to(out.dtype.element_ty), mask=exists)  # [BLOCK_N, BLOCK_V]
    else:
        left, right = split_columns(raw, BLOCK_V)
        store_gradient(
            out, out_stride, left, bias, bias_stride, cap, scale, row_max, log_sum, alpha, beta, target_value, target,
            rows, n_rows, first_column, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY,
        )  # fmt: skip
        store_gradient(
            out, out_stride, right, bias, bias_stride, cap, scale, row_max, log_sum, alpha, beta, target_value, target,
            rows, n_rows, first_column + BLOCK_V // 2, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "first_column"])
def logit_gradient_kernel(
    out, hidden, weight, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, out_stride, first_column,
    logp, row_max, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, gain, slope,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of the slab per program.

    out: [n_rows, n_columns], row stride ``out_stride``. weight, bias: of the slab. targets: [n_rows] int64 in the whole
    vocabulary, whose column ``first_column`` is the slab's first. slope: logit_scale * inv_temperature, to be multiplied by the
    row's own inverse temperature. The others: see ``gradient_coefficients``, ``product.raw_logits`` and ``math.shape_logits``.
    """
    row_tile, column_tile = group_order(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), tl.cdiv(n_columns, BLOCK_V), GROUP_N)
    first_row, first = row_tile * BLOCK_N, column_tile * BLOCK_V
    raw = raw_logits(
        hidden, weight, first_row, first, n_rows, n_columns, dim, hidden_stride_n, hidden_stride_d, weight_stride_v,
        weight_stride_d, BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
    )  # fmt: skip
    rows = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)
    safe_rows = tl.minimum(rows, n_rows - 1)
    alpha, beta, target_value = gradient_coefficients(
        logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, gain,
        row_scale(row_inv_temperature, slope, safe_rows), safe_rows,
    )  # fmt: skip
    target = (tl.load(targets + safe_rows) - first_column).to(tl.int32)  # [BLOCK_N]
    store_gradient(
        out, out_stride, raw, bias, bias_stride, cap, row_scale(row_inv_temperature, scale, safe_rows),
        tl.load(row_max + safe_rows), tl.load(log_sum + safe_rows), alpha, beta, target_value, target,
        rows, n_rows, first, n_columns, BLOCK_V, SLICES, grad_entropy is not None,
    )  # fmt: skip


def gradient_arguments(
    projection: Projection, targets: Tensor, statistics: RowStatistics, cotangents: LogitCotangents, gain: Tensor | None
) -> dict[str, Any]:
    """What both gradient kernels take besides their logits."""
    entropy = cotangents.entropy is not None
    vectors = {
        "targets": targets,
        "logp": statistics.logp,
        "row_max": statistics.row_max,
        "log_sum": statistics.log_sum,
        "mean_shifted": statistics.mean_shifted if entropy else None,
        "grad_logp": cotangents.logp,
        "grad_entropy": cotangents.entropy,
        "grad_lse": cotangents.lse,
    }
    arguments = {name: None if v is None else v.contiguous() for name, v in vectors.items()}
    slope = projection.logit_scale * projection.inv_temperature
    return arguments | {"gain": gain, "slope": slope} | transform_arguments(projection)


def logit_gradient(
    out: Tensor,
    projection: Projection,
    targets: Tensor,
    columns: slice,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
    gain: Tensor | None,
    *,
    tile: Tile | None = None,
) -> Launch:
    """The launch of ``backend.LogitGradient``. tile: instead of the table's."""
    bias = None if projection.bias is None else projection.bias[columns]
    slab = replace(projection, weight=projection.weight[columns], bias=bias)
    tile = tile or product_tile("logit_gradient", slab)
    arguments = {"out": out, "out_stride": out.stride(0), "first_column": columns.start, "SLICES": tile.slices}
    arguments |= product_arguments(slab, tile) | gradient_arguments(slab, targets, statistics, cotangents, gain)
    grid = triton.cdiv(slab.n_rows, tile.block_n) * triton.cdiv(slab.vocab, tile.block_v)
    return Launch(logit_gradient_kernel, grid, arguments, options(tile), out.device)
