"""A tile of raw logits by ``tl.dot`` with fp32 accumulation: the main loop of every kernel that multiplies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_order(pid, n_row_tiles, n_columns, GROUP_N: tl.constexpr):
    """(row tile, column) of a program: GROUP_N row tiles sweep the columns together, so that both operands stay in L2."""
    per_group = GROUP_N * n_columns
    first = pid // per_group * GROUP_N
    size = tl.minimum(n_row_tiles - first, GROUP_N)
    inside = pid % per_group
    return first + inside % size, inside // size


@triton.jit
def raw_logits(
    hidden, weight, first_row, first_column, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, rescue_ids=None,
):  # fmt: skip
    """(hidden @ weight.T)[first_row : + BLOCK_N, first_column : + BLOCK_V], [BLOCK_N, BLOCK_V] fp32.

    What lies behind the last row or column means nothing (copies of the last one, or zeros). fp32 operands are multiplied in
    fp32, not in tf32.

    hidden [n_rows, dim], weight [n_columns, dim]: with DESCRIPTORS, descriptors of blocks [BLOCK_N, BLOCK_D] and
    [BLOCK_V, BLOCK_D], else pointers with strides. EVEN_D: dim is a multiple of BLOCK_D. WIDEN: multiply in fp32, because the
    interpreter's product of bf16 is wrong. rescue_ids: None, or pointer to [n_rows] int32, the rows of hidden to take instead of
    0 ... n_rows - 1 (without DESCRIPTORS).
    """
    product = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if DESCRIPTORS:
        for d in range(0, dim, BLOCK_D):
            h = hidden.load([first_row, d])  # [BLOCK_N, BLOCK_D]
            w = weight.load([first_column, d])  # [BLOCK_V, BLOCK_D]
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            product = tl.dot(h, tl.trans(w), product, input_precision="ieee")
    else:
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_N), n_rows - 1).to(tl.int64)
        if rescue_ids is not None:
            rows = tl.load(rescue_ids + rows).to(tl.int64)  # [BLOCK_N]
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        h_at = hidden + rows[:, None] * hidden_stride_n + dims[None, :].to(tl.int64) * hidden_stride_d
        w_at = weight + columns[:, None] * weight_stride_v + dims[None, :].to(tl.int64) * weight_stride_d
        for d in range(0, dim, BLOCK_D):
            if EVEN_D:
                h = tl.load(h_at)  # [BLOCK_N, BLOCK_D]
                w = tl.load(w_at)  # [BLOCK_V, BLOCK_D]
            else:
                inside = (dims < dim - d)[None, :]
                h = tl.load(h_at, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
                w = tl.load(w_at, mask=inside, other=0.0)  # [BLOCK_V, BLOCK_D]
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            product = tl.dot(h, tl.trans(w), product, input_precision="ieee")
            h_at += BLOCK_D * tl.cast(hidden_stride_d, tl.int64)
            w_at += BLOCK_D * tl.cast(weight_stride_d, tl.int64)
    return product
