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
from .backend import Backend, Chunk, Coefficients, LogitCotangents, TargetRows
from .budget import workspace_bytes
from .projection import Projection
from .rows import fill_holes_, scatter_rows
from .weight_gradient import MainGrad, WeightGradient

_WORTH_MOVING = 0.02
"""Share of dead rows from which moving the live ones into their places costs less than multiplying them by zero."""

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
    entropy: bool = True,
    entropy_gradient: bool,
    needs: tuple[bool, bool, bool],
    options: Options,
    logp_guess: Tensor | None = None,
    main_grad: MainGrad | None = None,
) -> Gradients:
    """Run all chunks.

    Args:
        projection: the rows that count.
        targets: [M] int64, valid; in the whole vocabulary where it is split over processes.
        index: [M] their places among ``n_rows`` rows, or None when all count.
        n_rows: N.
        coefficients: turns a chunk's statistics into cotangents and sums.
        backend: who computes.
        entropy: the coefficient function reads entropies.
        entropy_gradient: the coefficient function returns a cotangent for the entropy.
        needs: gradients wanted for hidden, weight, bias; all False computes the sums alone.
        options: memory budget and plan.
        logp_guess: [M] fp32, about the log-prob of each target (``backend.OpenChunk``), or None.
        main_grad: where the weight's gradient goes instead of being returned, or None.
    """
    dtype = projection.statistics_dtype
    hidden, weight, shard = projection.hidden, projection.weight, projection.shard
    targets = projection.local_targets(targets)
    stored = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # weight and bias have hidden's dtype
    sums = hidden.new_zeros(len(SUMS), dtype=dtype)
    need_hidden, need_weight, need_bias = needs
    row_bytes = backend.chunk_row_bytes(projection, entropy_gradient)
    budget = workspace_bytes(options.memory_budget, hidden.device)
    plan = plans.one_pass(projection.n_rows, row_bytes, budget, options.plan)
    d_hidden = torch.zeros_like(hidden, dtype=stored, memory_format=torch.contiguous_format) if need_hidden else None
    d_weight = d_bias = None
    if need_weight:
        whole = plan.name == "one_chunk"
        d_weight = WeightGradient(
            projection, stored, one_chunk=whole, main_grad=main_grad, add_target_rows=backend.add_target_rows
        )
    if need_bias:
        d_bias = weight.new_zeros(projection.vocab, dtype=dtype)
    for start in range(0, projection.n_rows, plan.rows):
        rows = slice(start, min(start + plan.rows, projection.n_rows))
        part = projection.rows(rows)
        part_hint = None if logp_guess is None else logp_guess[rows]
        chunk = backend.open_chunk(
            part, targets[rows], entropy=entropy, entropy_gradient=entropy_gradient, logp_guess=part_hint
        )
        cotangents, chunk_sums = coefficients(chunk, rows)
        sums += chunk_sums
        if not any(needs):
            del chunk  # before the next one is allocated
            continue
        gradient = chunk.gradient(cotangents)
        part_hidden, part_targets = part.hidden, targets[rows]
        live = _live_rows(gradient.matrix, cotangents)
        if live is not None:
            gradient, part_hidden, part_targets = gradient.front(live), part_hidden[live], part_targets[live]
        if d_hidden is not None:
            product = torch.empty_like(part_hidden, dtype=dtype)
            products.add_product_(product, gradient.matrix, weight, overwrite=True).mul_(gradient.row_factor.unsqueeze(1))
            if gradient.target is not None:
                products.add_gathered_rows_(product, weight, part_targets, gradient.target)
            if shard is not None:
                shard.add_(product)
            d_hidden[rows] = scatter_rows(product, live, rows.stop - start)
            del product
        if d_weight is not None:
            d_weight.add(gradient, part_hidden, part_targets)
        if d_bias is not None:
            products.add_weighted_rows_(d_bias, gradient.matrix, gradient.row_factor)
            if gradient.target is not None:
                assert backend.add_target_rows is not None
                ones = gradient.target.new_ones(len(part_targets), 1)
                backend.add_target_rows(d_bias.unsqueeze(1), 0, TargetRows.sort(part_targets, ones, gradient.target))
        del chunk, gradient
    if d_hidden is not None:
        d_hidden = scatter_rows(d_hidden, index, n_rows)
    return Gradients(
        sums, d_hidden, None if d_weight is None else d_weight.result(), None if d_bias is None else d_bias.to(stored)
    )


def _live_rows(matrix: Tensor, cotangents: LogitCotangents) -> Tensor | None:
    """Rows whose gradient is not zero, moved to the front of ``matrix`` [C, V], when leaving out the others pays; else None.

    A row is dead when its token was clipped or has no advantage. On the CPU only: on CUDA their number would have to come back
    to the host in the middle of the loop.
    """
    if matrix.is_cuda:
        return None
    live = torch.stack([c != 0 for c in cotangents if c is not None]).any(0)
    dead = len(live) - int(live.sum())
    return fill_holes_(matrix, live) if dead > len(live) * _WORTH_MOVING else None
