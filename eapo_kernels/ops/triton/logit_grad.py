"""The logit gradient dL/d(hidden @ weight.T + bias) from the statistics (E6).

``logit_gradient`` recomputes a slab of logits; ``row_gradient`` reads stored logits and may write
its result over them. ``LogitChunk`` is the one-pass chunk that stores logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gemm
from ..dispatch import Coefficients, LogitCotangents, LogitGradient, RowStatistics, SurrogateTerms
from ..lm_head import Projection
from . import tiles
from .online_softmax import finalize, load_tile, row_statistics
from .surrogate import Finalized
from .tiles import Tile

from .common import (  # isort: skip
    LOG2E, PER_CALL, Launch, expm1, family, group_order, options, product_arguments, product_tile, raw_logits, row_scale,
    shape_logits, split_columns, tile_count, tile_has_target_or_tail, workspace,
)  # fmt: skip


@triton.jit
def gradient_coefficients(logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, slope, rows):
    """(alpha, beta, target), each [BLOCK_N]: the gradient is p_v (alpha - beta x_v), and ``target``
    at v = y (E6).

    logp, log_sum, mean_shifted, grad_*: [N] fp32. A cotangent that is None is zero;
    ``mean_shifted`` is read only with ``grad_entropy``. slope: [BLOCK_N], dz / d(hidden @ weight.T)
    without the soft-cap's part.
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
    return alpha * slope, beta * slope, target * slope


@triton.jit
def gradient_tile(y, scale, row_offset, log_sum, alpha, beta, ENTROPY: tl.constexpr):
    """p_v (alpha - beta x_v), [BLOCK_N, BLOCK_V] as y; the vectors are [BLOCK_N]."""
    x = tl.fma(y, scale[:, None], -row_offset[:, None])
    p = tl.exp2((x - log_sum[:, None]) * LOG2E)
    if ENTROPY:
        p *= alpha[:, None] - beta[:, None] * x
    else:
        p *= alpha[:, None]
    return p


@triton.jit
def store_gradient(
    out, out_stride, raw, bias, bias_stride, cap, scale, row_offset, log_sum, alpha, beta, target_value, target,
    rows, n_rows, first_column, n_columns, BLOCK_V: tl.constexpr, SLICES: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Write p_v (alpha - beta x_v), or ``target_value`` at the target, times the soft-cap's slope.

    For branches and SLICES see ``online_softmax.online_softmax_update``.
    """
    if SLICES == 1:
        columns = first_column + tl.arange(0, BLOCK_V)
        safe_columns = tl.minimum(columns, n_columns - 1)
        at = out + rows[:, None] * out_stride + columns[None, :]
        exists = (rows < n_rows)[:, None]
        if tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V):
            y, slope = shape_logits(raw, bias, bias_stride, safe_columns, cap)
            gradient = gradient_tile(y, scale, row_offset, log_sum, alpha, beta, ENTROPY)
            is_target = tl.arange(0, BLOCK_V)[None, :] == (target - first_column)[:, None]
            gradient = tl.where(is_target, target_value[:, None], gradient) * slope
            tl.store(at, gradient.to(out.dtype.element_ty), mask=exists & (columns < n_columns)[None, :])  # [BLOCK_N, BLOCK_V]
        else:
            y, slope = shape_logits(raw, bias, bias_stride, safe_columns, cap)
            gradient = gradient_tile(y, scale, row_offset, log_sum, alpha, beta, ENTROPY) * slope
            tl.store(at, gradient.to(out.dtype.element_ty), mask=exists)  # [BLOCK_N, BLOCK_V]
    else:
        left, right = split_columns(raw, BLOCK_V)
        store_gradient(
            out, out_stride, left, bias, bias_stride, cap, scale, row_offset, log_sum, alpha, beta, target_value, target,
            rows, n_rows, first_column, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY,
        )  # fmt: skip
        store_gradient(
            out, out_stride, right, bias, bias_stride, cap, scale, row_offset, log_sum, alpha, beta, target_value, target,
            rows, n_rows, first_column + BLOCK_V // 2, n_columns, BLOCK_V // 2, SLICES // 2, ENTROPY,
        )  # fmt: skip


@triton.jit(do_not_specialize=PER_CALL)
def logit_gradient_kernel(
    out, hidden, weight, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d, bias_stride, out_stride, first_column,
    logp, row_offset, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, slope,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of a slab of the vocabulary per program.

    out: [n_rows, n_columns], row stride ``out_stride``. weight, bias: the slab's.
    targets: [n_rows] int64 in the whole vocabulary; ``first_column`` is the slab's first column.
    slope: logit_scale * inv_temperature, to be multiplied by the row's own inverse temperature.
    The others: see ``gradient_coefficients``, ``raw_logits`` and ``shape_logits``.
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
        logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse,
        row_scale(row_inv_temperature, slope, safe_rows), safe_rows,
    )  # fmt: skip
    target = (tl.load(targets + safe_rows) - first_column).to(tl.int32)  # [BLOCK_N]
    store_gradient(
        out, out_stride, raw, bias, bias_stride, cap, row_scale(row_inv_temperature, scale, safe_rows),
        tl.load(row_offset + safe_rows), tl.load(log_sum + safe_rows), alpha, beta, target_value, target,
        rows, n_rows, first, n_columns, BLOCK_V, SLICES, grad_entropy is not None,
    )  # fmt: skip


def gradient_arguments(targets: Tensor, statistics: RowStatistics, cotangents: LogitCotangents) -> dict[str, Any]:
    """The vectors that both gradient kernels read."""
    entropy = cotangents.entropy is not None
    vectors = {
        "targets": targets, "logp": statistics.logp, "row_offset": statistics.row_offset, "log_sum": statistics.log_sum,
        "mean_shifted": statistics.mean_shifted if entropy else None, "grad_logp": cotangents.logp,
        "grad_entropy": cotangents.entropy, "grad_lse": cotangents.lse,
    }  # fmt: skip
    return {name: None if v is None else v.contiguous() for name, v in vectors.items()}


def logit_gradient(
    out: Tensor, projection: Projection, targets: Tensor, columns: slice, statistics: RowStatistics,
    cotangents: LogitCotangents, *, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """The launch of ``dispatch.Backend.logit_gradient``. tile: instead of the table's."""
    bias = None if projection.bias is None else projection.bias[columns]
    slab = replace(projection, weight=projection.weight[columns], bias=bias)
    tile = tile or product_tile("logit_gradient", slab)
    arguments = {"out": out, "out_stride": out.stride(0), "first_column": columns.start, "SLICES": tile.slices}
    arguments |= product_arguments(slab, tile) | gradient_arguments(targets, statistics, cotangents)
    return Launch(logit_gradient_kernel, tile_count(slab, tile), arguments, options(tile), out.device)


@triton.jit(do_not_specialize=PER_CALL)
def row_gradient_kernel(
    out, raw, bias, targets, row_inv_temperature, scale, cap, n_rows, n_columns, raw_stride, bias_stride, out_stride,
    logp, row_offset, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse, slope,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of raw logits per program, which loads it before it stores.

    out: may be ``raw``.
    raw: [n_rows, n_columns] fp32. The others: see ``logit_gradient_kernel``.
    """
    n_tiles = tl.cdiv(n_columns, BLOCK_V)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = tl.minimum(rows, n_rows - 1)
    first = tl.program_id(0) % n_tiles * BLOCK_V
    tile = load_tile(raw, raw_stride, safe_rows, first, BLOCK_V)
    alpha, beta, target_value = gradient_coefficients(
        logp, log_sum, mean_shifted, grad_logp, grad_entropy, grad_lse,
        row_scale(row_inv_temperature, slope, safe_rows), safe_rows,
    )  # fmt: skip
    target = tl.load(targets + safe_rows).to(tl.int32)  # [BLOCK_N]
    store_gradient(
        out, out_stride, tile, bias, bias_stride, cap, row_scale(row_inv_temperature, scale, safe_rows),
        tl.load(row_offset + safe_rows), tl.load(log_sum + safe_rows), alpha, beta, target_value, target,
        rows, n_rows, first, n_columns, BLOCK_V, 1, grad_entropy is not None,
    )  # fmt: skip


def row_gradient(
    out: Tensor, raw: Tensor, projection: Projection, targets: Tensor, statistics: RowStatistics,
    cotangents: LogitCotangents, *, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """The launch that writes dL/draw [N, V] to ``out``, which may be ``raw``."""
    tile = tile or tiles.find("row_gradient", family(raw.device), 4)
    arguments = projection.arguments | gradient_arguments(targets, statistics, cotangents) | {
        "out": out, "raw": raw, "raw_stride": raw.stride(0), "out_stride": out.stride(0),
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v,
    }  # fmt: skip
    return Launch(row_gradient_kernel, tile_count(projection, tile), arguments, options(tile), out.device)


class LogitChunk:
    """See ``dispatch.Chunk``. Stores raw fp32 logits, so ``gradient`` may have any cotangents."""

    def __init__(self, projection: Projection, targets: Tensor, *, entropy: bool) -> None:
        self._projection, self._targets = projection, targets
        raw = workspace(projection, torch.float32)
        self._raw: Tensor | None = gemm.project_(raw, projection.hidden, projection.weight)
        launch, sums = row_statistics(raw, projection, targets, entropy=entropy)
        launch()
        self._sums = sums.all_gathered(projection.shard, targets)
        self._final: Finalized | None = None

    def _finalize(self, terms: SurrogateTerms | None) -> Finalized:
        if self._final is None or terms is not None:
            launch, self._final = finalize(self._sums, terms)
            launch()
        return self._final

    def statistics(self) -> RowStatistics:
        """One launch."""
        return self._finalize(None).statistics()

    def surrogate(self, terms: SurrogateTerms) -> Coefficients:
        """One launch."""
        return self._finalize(terms).coefficients()

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        """One launch; it overwrites the logits where the operands of the products are fp32."""
        assert self._raw is not None, "gradient: expected one call per chunk, got a second one"
        raw, self._raw = self._raw, None
        dtype = self._projection.operand_dtype
        matrix = raw if dtype == raw.dtype else workspace(self._projection, dtype)
        cotangents, row_scale = cotangents.split_pow2(dtype)
        row_gradient(matrix, raw, self._projection, self._targets, self.statistics(), cotangents)()
        return LogitGradient(matrix, row_scale)
