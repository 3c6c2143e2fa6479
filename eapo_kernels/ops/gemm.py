"""Matrix products with accumulation in fp32 (or fp64) for operands of any dtype.

On CUDA the library accumulates products of half-precision operands in fp32 and returns fp32
(``out_dtype``), which also keeps split-K partial sums in fp32. A CPU product of half-precision
operands rounds its result to half precision, so the operands are widened, a part at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WIDEN_ROWS = 8192  # rows of a weight matrix (columns of logits) that are widened at once


def add_product_(out: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> Tensor:
    """out += a @ b, or out = a @ b with ``overwrite``.

    out: [M, K] fp32/fp64; a: [M, J], b: [J, K], each of out's or of a narrower dtype.
    """
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out) if overwrite else torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out) if overwrite else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # widen the larger operand in pieces
        if overwrite:
            out.zero_()
        if b.shape[1] >= max(a.shape):
            wide = a.to(out.dtype)
            for start in range(0, b.shape[1], _WIDEN_ROWS):
                piece = slice(start, start + _WIDEN_ROWS)
                out[:, piece].addmm_(wide, b[:, piece].to(out.dtype))
        else:
            for a_part, b_part in zip(a.split(_WIDEN_ROWS, 1), b.split(_WIDEN_ROWS), strict=True):
                out.addmm_(a_part.to(out.dtype), b_part.to(out.dtype))
    return out


def scale_rows(matrix: Tensor, row_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(row_scale[:, None] * matrix / pow2_scale in ``dtype``, pow2_scale: 0-dim, or None for 1).

    matrix: [N, D] dtype or wider; row_scale: [N] fp32/fp64. Only fp16 needs a pow2_scale: the
    coefficients of a mean or of a scaled loss are outside its range, and the row scales of a chunk
    may differ by a factor of 2^25 (docs/math.md, "In fp16"). The largest number becomes 2^14 or
    more, which uses most of the range.
    """
    if dtype != torch.float16 or len(matrix) == 0:
        return torch.mul(matrix, row_scale.unsqueeze(1), out=torch.empty_like(matrix, dtype=dtype)), None
    largest = (torch.linalg.vector_norm(matrix, math.inf, dim=1).to(row_scale.dtype) * row_scale.abs()).amax()
    pow2_scale = torch.where(largest > 0, torch.exp2(largest.log2().floor() - 14), 1.0)
    return torch.mul(matrix, (row_scale / pow2_scale).unsqueeze(1), out=torch.empty_like(matrix, dtype=dtype)), pow2_scale


def add_weighted_rows_(out: Tensor, matrix: Tensor, row_scale: Tensor) -> Tensor:
    """out += row_scale @ matrix, in out's precision; widens a narrower matrix in slabs of columns.

    out: [V] fp32/fp64; matrix: [N, V] of out's or a narrower dtype; row_scale: [N] dtype of out.
    """
    step = matrix.shape[1] if matrix.dtype == out.dtype else _WIDEN_ROWS
    for start in range(0, matrix.shape[1], step):
        piece = slice(start, start + step)
        out[piece].addmv_(matrix[:, piece].t().to(out.dtype), row_scale)
    return out


def project_(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out = hidden @ weight.T. out: [N, V] fp32/fp64; hidden: [N, D]; weight: [V, D]."""
    return add_product_(out, hidden, weight.t(), overwrite=True)
