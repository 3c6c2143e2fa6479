"""Entropy of the renormalised nucleus, the most probable tokens that together have a given mass.

Plain PyTorch on chunks of rows, for any device (arXiv 2509.25133). It is separate from
``token_stats``, because it needs a partial sort of every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ShapeError, describe, require, require_number, require_tensor
from ..types import DEFAULT_OPTIONS, IGNORE_INDEX, Options
from . import chunking, gemm
from .dispatch import LogitCotangents, LogitGradient
from .gradients import GradientSum
from .lm_head import Projection, build_projection, check_values, resolve_compaction, scatter_rows, select_valid
from .torch_backend import BACKEND

_FIRST_GUESS = 256
"""Tokens that are sorted first; eight times as many, repeatedly, while a nucleus is larger."""


class _Nucleus(NamedTuple):
    """The nucleus K of every row of a chunk.

    Attributes:
        x: [R, V] z - row maximum.
        lowest: [R, 1] the smallest x in K.
        tied: [R, 1] int64, how many of the tokens with x = lowest belong to K, the first by index.
        log_mass: [R] log sum_K e^x.
        entropy: [R] -sum_K q log q, q = e^(x - log_mass).
    """

    x: Tensor
    lowest: Tensor
    tied: Tensor
    log_mass: Tensor
    entropy: Tensor

    def members(self) -> Tensor:
        """[R, V] bool."""
        equal = self.x == self.lowest
        return (self.x > self.lowest) | (equal & (equal.cumsum(1, dtype=torch.int32) <= self.tied))


def _find(z: Tensor, top_p: float) -> _Nucleus:
    """The nuclei of logits z [R, V], overwritten by ``x``. Synchronizes on CUDA."""
    x = z.sub_(z.amax(1, keepdim=True))
    target = top_p * x.exp().sum(1, keepdim=True)
    vocab, size = x.shape[1], _FIRST_GUESS
    while True:
        best = x.topk(min(size, vocab), dim=1).values
        e = best.exp()
        short = e.cumsum(1) < target
        if size >= vocab or not bool(short[:, -1].any()):
            break
        size *= 8
    last = short.sum(1, keepdim=True).clamp_max(best.shape[1] - 1)
    lowest = best.gather(1, last)
    inside = torch.arange(best.shape[1], device=x.device) <= last
    tied = (inside & (best == lowest)).sum(1, keepdim=True)
    e = torch.where(inside, e, 0.0)
    mass = e.sum(1)
    mean = torch.where(e > 0, e * best, 0.0).sum(1) / mass
    log_mass = mass.log()
    return _Nucleus(x, lowest, tied, log_mass, (log_mass - mean).clamp_min(0))


def _logits(projection: Projection) -> Tensor:
    """z [R, V] of a chunk."""
    out = projection.hidden.new_empty(projection.n_rows, projection.vocab, dtype=projection.statistics_dtype)
    gemm.project_(out, projection.hidden, projection.weight)
    return projection.transform_logits_(out, slice(0, projection.vocab))


def _chunks(projection: Projection, budget: int) -> list[slice]:
    """Chunks of rows whose logits, gradient and temporaries fit the budget."""
    row_bytes = projection.vocab * (5 * projection.statistics_dtype.itemsize + projection.operand_dtype.itemsize)
    step = chunking.row_chunk(projection.n_rows, row_bytes, budget)
    return [slice(start, start + step) for start in range(0, projection.n_rows, step)]


def _gradient(chunk: Projection, cotangent: Tensor, top_p: float) -> Tensor:
    """cotangent * dHk/d(hidden @ weight.T + bias), [R, V] statistics dtype."""
    z = _logits(chunk)
    slope = chunk.softcap_slope(z) if chunk.softcap is not None else None
    nucleus = _find(z, top_p)
    outside = nucleus.members().logical_not_()
    log_q = nucleus.x.sub_(nucleus.log_mass.unsqueeze(1)).masked_fill_(outside, 0.0)
    scale = (-cotangent * chunk.row_scale()).unsqueeze(1)
    q = log_q.exp().masked_fill_(outside, 0.0)
    gradient = log_q.add_(nucleus.entropy.unsqueeze(1)).mul_(q).mul_(scale)
    return gradient if slope is None else gradient.mul_(slope)


class _NucleusEntropy(torch.autograd.Function):
    """Saves the inputs only: the backward recomputes the logits and the nuclei."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection, top_p: float, budget: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, projection.row_inv_temperature)
        ctx.scalars = (projection.inv_temperature, projection.logit_scale, projection.softcap, top_p, budget)
        out = hidden.new_empty(projection.n_rows, dtype=projection.statistics_dtype)
        for rows in _chunks(projection, budget):
            out[rows] = _find(_logits(projection.rows(rows)), top_p).entropy
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, temperatures = ctx.saved_tensors
        inv_temperature, logit_scale, softcap, top_p, budget = ctx.scalars
        projection = Projection(hidden, weight, bias, inv_temperature, temperatures, logit_scale, softcap)
        chunks = _chunks(projection, budget)
        needs = ctx.needs_input_grad[:3]
        total = GradientSum(projection, BACKEND, needs, dtype=hidden.dtype, one_chunk=len(chunks) <= 1)
        cotangents, row_scale = LogitCotangents(None, cotangent.to(projection.statistics_dtype)).split_pow2(
            projection.operand_dtype
        )
        assert cotangents.entropy is not None
        for rows in chunks:
            gradient = _gradient(projection.rows(rows), cotangents.entropy[rows], top_p)
            total.add(LogitGradient(gradient.to(projection.operand_dtype), row_scale[rows]), rows)
        return (*total.result(), None, None, None)


def project_nucleus_entropy(projection: Projection, valid: Tensor, top_p: float, options: Options) -> Tensor:
    """``nucleus_entropy`` [N] of a checked projection; zeros at rows that are not ``valid`` [N]."""
    n_rows = projection.n_rows
    projection, index = select_valid(projection, valid, options.compact)
    if projection.n_rows == 0:
        inputs = (projection.hidden, projection.weight, projection.bias)
        nothing = sum(t[:0].sum() for t in inputs if t is not None)  # zero, with gradient
        return projection.hidden.new_zeros(n_rows, dtype=projection.statistics_dtype) + nothing
    budget = chunking.workspace_bytes(options, projection.hidden.device)
    values = _NucleusEntropy.apply(projection.hidden, projection.weight, projection.bias, projection, top_p, budget)
    if index is None:
        return torch.where(valid, values, 0.0)
    return scatter_rows(values, index, n_rows)


def nucleus_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_p: float,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    mask: Tensor | None = None,
    options: Options | None = None,
) -> Tensor:
    """Entropy of the renormalised nucleus of every position, without the logits (arXiv 2509.25133).

    K is the smallest set of most probable tokens with p(K) >= top_p; of equally probable tokens the
    first by index.

        q_v = p_v / p(K)      Hk = -sum_K q log q
        dHk / dz_v = -q_v (log q_v + Hk) on K, 0 elsewhere

    The gradient treats K as constant (it changes only where two probabilities are equal).

    Args:
        hidden: [..., D] bf16/fp16/fp32/fp64, as in ``token_stats``.
        weight: [V, D], the head's weight, dtype and device of ``hidden``.
        top_p: mass of the nucleus, in (0, 1).
        bias, inv_temperature, softcap, logit_scale: as in ``token_stats``.
        mask: [...] bool or None, False masks a row.
        options: memory budget, compaction and checks. The backward recomputes the logits.

    Returns:
        [...] fp32 (fp64 for fp64 inputs), nats. Masked rows, and rows whose nucleus is one token,
        are exact zeros with zero gradient. Synchronizes on CUDA.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: a value is out of range.
    """
    options = DEFAULT_OPTIONS if options is None else options
    require(isinstance(options, Options), "options", "Options or None", options)
    require_number("top_p", top_p)
    require(0 < top_p < 1, "top_p", "a number in (0, 1)", top_p)
    if not isinstance(hidden, Tensor) or hidden.dim() == 0:
        raise ShapeError(f"hidden: expected a floating-point [..., D], got {describe(hidden)}")
    shape = hidden.shape[:-1]
    projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, shape)
    valid = torch.ones(projection.n_rows, dtype=torch.bool, device=hidden.device)
    if mask is not None:
        require_tensor("mask", mask, tuple(shape), (torch.bool,), projection.hidden)
        valid = mask.reshape(-1)
    options = resolve_compaction(options, valid, mask is not None)
    check_values(projection, torch.where(valid, 0, IGNORE_INDEX), options.debug)
    return project_nucleus_entropy(projection, valid, float(top_p), options).reshape(shape)
