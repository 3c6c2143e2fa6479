"""One pass: loss and gradients share a single logit computation per token chunk (6NDV operations instead of 8).

Between the first and the second matrix product a chunk's own statistics become coefficients, so nothing is recomputed.
This is possible when a token's coefficient depends on its own statistics only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SUMS, Options
from . import plans, products
from .backend import Backend, Chunk, Coefficients
from .projection import Projection
from .rows import scatter_rows

CoefficientFunction = Callable[[Chunk, slice], Coefficients]
"""(chunk, its rows) -> cotangents of the chunk's statistics and sums to log."""


class Gradients(NamedTuple):
    """What one pass yields: sums [len(SUMS)] fp32 and the gradients of the loss sum, None where not needed.

    d_hidden [N, D], d_weight [V, D], d_bias [V] have the inputs' dtypes, but fp32 for fp16 inputs: the loss has not been scaled
    up yet, and fp16 would lose small gradients.
    """

    sums: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None


def policy_gradient(
    projection: Projection,
    targets: Tensor,
    index: Tensor | None,
    n_rows: int,
    coefficients: CoefficientFunction,
    backend: Backend,
    *,
    entropy_gradient: bool,
    needs: tuple[bool, bool, bool],
    options: Options,
    hint: Tensor | None = None,
) -> Gradients:
    """Run all chunks.

    Args:
        projection: the rows that count.
        targets: [M] int64, valid.
        index: [M] their places among ``n_rows`` rows, or None when all count.
        n_rows: N.
        coefficients: turns a chunk's statistics into cotangents and sums.
        backend: who computes.
        entropy_gradient: the coefficient function returns a cotangent for the entropy.
        needs: gradients wanted for hidden, weight, bias; all False computes the sums alone.
        options: memory budget.
        hint: [M] fp32, about the log-prob of each target (``backend.OpenChunk``), or None.
    """
    dtype = projection.statistics_dtype
    hidden, weight = projection.hidden, projection.weight
    stored = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # weight and bias have hidden's dtype
    sums = hidden.new_zeros(len(SUMS), dtype=dtype)
    need_hidden, need_weight, need_bias = needs
    d_hidden = torch.zeros_like(hidden, dtype=stored, memory_format=torch.contiguous_format) if need_hidden else None
    d_weight = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = weight.new_zeros(projection.vocab, dtype=dtype) if need_bias else None
    unit = _unit(projection)
    step = plans.row_chunk(projection.n_rows, backend.chunk_row_bytes(projection, entropy_gradient), options.memory_budget)
    for start in range(0, projection.n_rows, step):
        rows = slice(start, min(start + step, projection.n_rows))
        part = projection.rows(rows)
        part_hint = None if hint is None else hint[rows]
        chunk = backend.open_chunk(part, targets[rows], entropy=True, entropy_gradient=entropy_gradient, hint=part_hint)
        cotangents, chunk_sums = coefficients(chunk, rows)
        sums += chunk_sums
        if not any(needs):
            del chunk  # before the next one is allocated
            continue
        matrix, factor = chunk.gradient(cotangents)
        if d_hidden is not None:
            product = products.add_product_(torch.empty_like(part.hidden, dtype=dtype), matrix, weight, overwrite=True)
            d_hidden[rows] = product.mul_(factor.unsqueeze(1))
        if d_weight is not None:
            scaled = (part.hidden * (factor / unit).unsqueeze(1)).to(projection.operand_dtype)
            products.add_product_(d_weight, matrix.t(), scaled)
        if d_bias is not None:
            products.add_weighted_rows_(d_bias, matrix, factor)
        del chunk, matrix
    if d_weight is not None:
        d_weight = d_weight.mul_(unit) if unit != 1.0 else d_weight
        d_weight = d_weight.to(stored)
    if d_bias is not None:
        d_bias = d_bias.to(stored)
    if d_hidden is not None:
        d_hidden = scatter_rows(d_hidden, index, n_rows)
    return Gradients(sums, d_hidden, d_weight, d_bias)


def _unit(projection: Projection) -> float:
    """A power of two near 1 / N, the size of a mean's coefficients: taken out of fp16 operands, which would underflow."""
    return 2.0 ** -(projection.n_rows.bit_length()) if projection.operand_dtype == torch.float16 else 1.0
