"""Two reductions of the logits over the vocabulary that softmax statistics do not give: a weighted sum, and the largest.

Without a soft-cap the weighted sum needs no logits: sum_v f_v z_v is one product of a row with
sum_v f_v weight_v. With one, and for the largest, the logits are computed again, a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import Options
from . import chunking, gemm
from .lm_head import Projection, scatter_rows, select_valid
from .statistics_op import fake_gradients

_BYTES_PER_LOGIT = 12  # fp32 logits, the slope of the soft-cap, and the operand made of it


def weighted_logits(projection: Projection, factors: Tensor, valid: Tensor, options: Options) -> Tensor:
    """sum_v factors_v z_v of every row, for the logits z of E1; differentiable.

    Args:
        factors: [V], of the columns of ``projection``; no gradient.
        valid: [N] bool. Other rows are 0 and have no gradient.
        options: memory budget, resolved compaction.

    Returns:
        [N] statistics dtype, summed over the ranks of a split head.
    """
    p = projection
    factors = factors.detach().to(p.hidden.device, p.statistics_dtype)
    return _sums_op(
        p.hidden, p.weight, p.bias, factors, valid, p.row_inv_temperature, *p.op_numbers(), options.memory_budget,
        bool(options.compact),
    )  # fmt: skip


def largest_logit(projection: Projection, valid: Tensor, options: Options) -> Tensor:
    """[N] int64: the column of every row's largest logit, the first among equal ones; -1 where not ``valid``."""
    p = projection
    return _largest_op(
        p.hidden.detach(), p.weight.detach(), None if p.bias is None else p.bias.detach(), valid, p.row_inv_temperature,
        *p.op_numbers(), options.memory_budget, bool(options.compact),
    )  # fmt: skip


def _parts(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def _wide_rows(p: Projection) -> list[slice]:
    """Rows whose hidden states are widened at once."""
    return _parts(p.n_rows, chunking.weight_slab(max(p.n_rows, 1), p.dim))


def _column(p: Projection, factors: Tensor) -> Tensor:
    """[D + 1]: sum_v factors_v weight_v, and sum_v factors_v bias_v, over all ranks."""
    found = factors.new_zeros(p.dim + 1)
    for here in _parts(p.vocab, chunking.weight_slab(p.vocab, p.dim)):
        gemm.add_weighted_rows_(found[:-1], p.weight[here], factors[here])
    if p.bias is not None:
        found[-1] = factors.dot(p.bias.to(factors.dtype))
    return found if p.shard is None else p.shard.all_reduce_(found)


class _Blocks:
    """The logits z of a projection, a block of rows and columns at a time, in one buffer."""

    def __init__(self, projection: Projection, budget: int) -> None:
        self._projection = projection
        rows, columns = chunking.slab(projection.n_rows, projection.vocab, _BYTES_PER_LOGIT, budget)
        self.rows, self.columns = _parts(projection.n_rows, rows), _parts(projection.vocab, columns)
        self._buffer = projection.hidden.new_empty(rows, chunking.padded(columns), dtype=projection.statistics_dtype)

    def __call__(self, rows: slice, columns: slice) -> tuple[Projection, Tensor]:
        part = self._projection.rows(rows)
        z = self._buffer[: part.n_rows, : columns.stop - columns.start]
        gemm.project_(z, part.hidden, part.weight[columns])
        return part, part.transform_logits_(z, columns)


def _sums(p: Projection, factors: Tensor, budget: int) -> Tensor:
    """[N]; see ``weighted_logits``."""
    sums = factors.new_zeros(p.n_rows)
    if p.softcap is None:
        column = _column(p, factors)
        for part in _wide_rows(p):
            sums[part] = p.hidden[part].to(factors.dtype) @ column[:-1]
        return (sums + column[-1]) * p.row_scale()
    blocks = _Blocks(p, budget)
    for columns in blocks.columns:
        for rows in blocks.rows:
            sums[rows].addmv_(blocks(rows, columns)[1], factors[columns])
    return sums if p.shard is None else p.shard.all_reduce_(sums)


def _gradients(
    p: Projection, factors: Tensor, grad: Tensor, needs: Sequence[bool], budget: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_hidden, d_weight and d_bias of ``_sums`` for the cotangents grad [N]."""
    pull, dtype = grad * p.row_scale(), factors.dtype  # of hidden @ weight.T + bias, without the slope of the soft-cap
    d_hidden = torch.empty_like(p.hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = torch.empty_like(p.weight, memory_format=torch.contiguous_format) if needs[1] else None
    if p.softcap is None:
        if d_hidden is not None:
            column = _column(p, factors)[:-1]
            for part in _wide_rows(p):
                d_hidden[part] = torch.outer(pull[part], column)
        if d_weight is not None:
            row = factors.new_zeros(p.dim)
            for part in _wide_rows(p):
                gemm.add_weighted_rows_(row, p.hidden[part], pull[part])
            for here in _parts(p.vocab, chunking.weight_slab(p.vocab, p.dim)):
                d_weight[here] = torch.outer(factors[here], row)
        return d_hidden, d_weight, (factors * pull.sum()).to(p.weight.dtype) if needs[2] else None
    largest = factors.abs().amax()
    unit, pull = factors / torch.where(largest > 0, largest, 1), pull * largest  # a narrow operand holds slope * unit
    sum_hidden = p.hidden.new_zeros(p.hidden.shape, dtype=dtype) if needs[0] else None
    d_bias = factors.new_zeros(p.vocab) if needs[2] else None
    operand, pow2_scale = gemm.scale_rows(p.hidden, pull, p.operand_dtype)
    blocks = _Blocks(p, budget)
    for columns in blocks.columns:
        weight = p.weight[columns]
        slab = factors.new_zeros(len(weight), p.dim) if d_weight is not None else None
        for rows in blocks.rows:
            block, z = blocks(rows, columns)
            matrix = block.softcap_slope(z).mul_(unit[columns]).to(p.operand_dtype)
            if sum_hidden is not None:
                gemm.add_product_(sum_hidden[rows], matrix, weight)
            if slab is not None:
                gemm.add_product_(slab, matrix.t(), operand[rows])
            if d_bias is not None:
                gemm.add_weighted_rows_(d_bias[columns], matrix, pull[rows])
        if d_weight is not None and slab is not None:
            d_weight[columns] = slab if pow2_scale is None else slab * pow2_scale
    if sum_hidden is not None:
        sum_hidden.mul_(pull.unsqueeze(1))
        d_hidden = (sum_hidden if p.shard is None else p.shard.all_reduce_(sum_hidden)).to(p.hidden.dtype)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(p.weight.dtype)


@torch.library.custom_op("eapo_kernels::weighted_logits", mutates_args=())
def _sums_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensor, valid: Tensor, row_inv_temperature: Tensor | None,
    inv_temperature: float, logit_scale: float, softcap: float | None, group: str, shard: Sequence[int],
    memory_budget: int | None, compact: bool,
) -> Tensor:  # fmt: skip
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    projection, index = select_valid(projection, valid, compact)
    budget = chunking.workspace_bytes(Options(memory_budget), hidden.device)
    sums = scatter_rows(_sums(projection, factors, budget), index, len(valid))
    return torch.where(valid, sums, 0)


@torch.library.custom_op("eapo_kernels::weighted_logits_backward", mutates_args=())
def _gradients_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensor, valid: Tensor, row_inv_temperature: Tensor | None,
    inv_temperature: float, logit_scale: float, softcap: float | None, group: str, shard: Sequence[int],
    memory_budget: int | None, compact: bool, grad: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    projection, index = select_valid(projection, valid, compact)
    grad = torch.where(valid, grad.to(factors.dtype), 0)
    budget = chunking.workspace_bytes(Options(memory_budget), hidden.device)
    found = _gradients(projection, factors, grad if index is None else grad[index], needs, budget)
    d_hidden = None if found[0] is None else scatter_rows(found[0], index, len(valid))
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in (d_hidden, *found[1:]))
    return d_hidden, d_weight, d_bias


@torch.library.custom_op("eapo_kernels::largest_logit", mutates_args=())
def _largest_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor, row_inv_temperature: Tensor | None,
    inv_temperature: float, logit_scale: float, softcap: float | None, group: str, shard: Sequence[int],
    memory_budget: int | None, compact: bool,
) -> Tensor:  # fmt: skip
    whole = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    p, index = select_valid(whole, valid, compact)
    best = p.hidden.new_full((p.n_rows,), -torch.inf, dtype=p.statistics_dtype)
    token = torch.zeros_like(best, dtype=torch.int64)
    blocks = _Blocks(p, chunking.workspace_bytes(Options(memory_budget), hidden.device))
    for columns in blocks.columns:
        for rows in blocks.rows:
            value, place = blocks(rows, columns)[1].max(1)
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            token[rows] = torch.where(better, place + columns.start, token[rows])
    if p.shard is not None:
        rank = p.shard.all_gather(best[None])[0].max(0).indices
        token = p.shard.all_gather((token + p.shard.start)[None])[0].gather(0, rank[None])[0]
    return torch.where(valid, scatter_rows(token, index, len(valid)), -1)


@_sums_op.register_fake
def _sums_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, factors: Tensor, *_: Any) -> Tensor:
    return factors.new_empty(hidden.shape[0])


@_largest_op.register_fake
def _largest_fake(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.others = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> Any:
    needs = ctx.needs_input_grad[:3]
    found = _gradients_op(*ctx.saved_tensors, *ctx.others, grad, needs)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * (3 + len(ctx.others)))


_gradients_op.register_fake(fake_gradients)
_sums_op.register_autograd(_backward, setup_context=_keep)
