"""Gradients of hidden, weight and bias from logit gradients of chunks, and the one-pass schedule.

One pass: loss and gradients share a single logit computation per chunk (6NDV operations instead of
8NDV). Between the first and the second matrix product a coefficient function turns the statistics
of a chunk into cotangents. So a token's cotangents can depend on its own statistics only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import SUMS, Options, rows_of
from . import chunking, gemm
from .dispatch import Backend, Chunk, Coefficients, LogitCotangents, LogitGradient, TargetRows
from .lm_head import Projection, fill_holes_, scatter_rows

_WORTH_MOVING = 0.02  # share of rows with zero gradient above which moving the others to the front pays

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # d_hidden, d_weight, d_bias; None where not needed


class MainGrad(NamedTuple):
    """The caller's accumulator of the weight's gradient."""

    tensor: Tensor  # [V, D] fp32 (fp64 for fp64 inputs), added to
    scale: float  # the caller will multiply the loss by it


class _Rows(NamedTuple):
    """The L rows of a chunk of C that are multiplied."""

    matrix: Tensor  # [C, V], of LogitGradient
    live: Tensor | None  # [L], places of the rows in the matrix; None: all C rows
    row_scale: Tensor  # [L], of LogitGradient
    target_grads: Tensor | None  # [L], of LogitGradient
    targets: Tensor  # [L] int64
    hidden: Tensor  # [L, D]

    def columns(self, here: slice) -> Tensor:
        """[L, columns] of the matrix: all, a view, or a copy of the live rows."""
        if self.live is not None:
            return self.matrix[self.live, here]
        return self.matrix if here == slice(0, self.matrix.shape[1]) else self.matrix[:, here]


class GradientSum:
    """d_hidden, d_weight and d_bias, summed over chunks of rows.

    d_weight of several chunks is summed in fp32 and rounded once. d_weight of one chunk is computed
    in slabs of the vocabulary, each rounded into place, so that there is no fp32 copy.

    Args:
        projection, backend: all rows; the backend that computes the chunks.
        needs, dtype: gradients wanted for hidden, weight, bias; dtype in which they are stored until
            ``result`` gives them in the inputs' dtypes.
        one_chunk: ``add`` is called once.
        main_grad: receives d_weight, summed in fp32, instead of the result; or None.
    """

    def __init__(
        self, projection: Projection, backend: Backend, needs: tuple[bool, bool, bool], *,
        dtype: torch.dtype, one_chunk: bool, main_grad: MainGrad | None = None,
    ) -> None:  # fmt: skip
        p = projection
        self._projection, self._dtype = p, p.statistics_dtype
        self._add_targets: Any = backend.add_target_rows  # None if its gradients have no target_grads
        self._returns_weight, self._scale = (True, 1.0) if main_grad is None else (False, main_grad.scale)
        self._is_fp16 = p.operand_dtype == torch.float16
        self._accumulates = main_grad is not None or not one_chunk or dtype == self._dtype
        self._hidden_dtype = dtype if needs[0] else None
        self._d_hidden: Tensor | None = None  # zeros before the first part, unless that has all rows
        self._d_weight = None if main_grad is None or not needs[1] else main_grad.tensor
        self._is_new = needs[1] and main_grad is None  # d_weight is not initialized
        if self._is_new:
            self._d_weight = p.weight.new_empty(p.weight.shape, dtype=self._dtype if self._accumulates else dtype)
        self._d_bias = p.weight.new_zeros(p.vocab, dtype=self._dtype) if needs[2] else None

    def add(self, gradient: LogitGradient, rows: slice | Tensor, targets: Tensor, live: Tensor | None = None) -> None:
        """Add the gradients of C rows: ``rows`` of the projection, with ``targets`` [C] int64.

        live: [L] places in the chunk of the rows with a gradient that is not zero; only these are
        multiplied. None: all rows.
        """
        hidden, matrix = rows_of(self._projection.hidden, rows), gradient.matrix
        has_all_rows = hidden is self._projection.hidden
        if live is not None:
            hidden, targets, gradient = hidden[live], targets[live], LogitGradient(matrix, gradient.scales[:, live])
        if len(hidden) == 0:
            return
        row_scale, target_grads = gradient.factors()
        part = _Rows(matrix, live, row_scale, target_grads, targets, hidden)
        if self._hidden_dtype is not None:
            d_hidden = scatter_rows(self._hidden_product(part), live, len(matrix)).to(self._hidden_dtype)
            if has_all_rows:
                self._d_hidden = d_hidden
            else:
                self._hidden_sum()[rows] = d_hidden
        if self._d_weight is not None:
            self._add_weight(self._d_weight, part)
            self._is_new = False
        if self._d_bias is not None:
            for here in self._slabs(live is None):
                gemm.add_weighted_rows_(rows_of(self._d_bias, here), part.columns(here), row_scale)
            if target_grads is not None:
                ones = TargetRows.sort(targets, target_grads.new_ones(len(targets), 1), target_grads)
                self._add_targets(self._d_bias.unsqueeze(1), 0, ones)

    def result(self, scale: Tensor | None = None) -> Gradients:
        """The gradients times ``scale`` (0-dim; None: 1), rounded once where they are sums in fp32.

        d_weight is None also where ``main_grad`` received it.
        """
        if self._d_weight is not None and self._is_new:
            self._d_weight.zero_()
        d_hidden = None if self._hidden_dtype is None else self._hidden_sum()
        d_weight = self._d_weight if self._returns_weight else None
        dtype = self._projection.hidden.dtype
        return _scaled(d_hidden, scale, dtype), _scaled(d_weight, scale, dtype), _scaled(self._d_bias, scale, dtype)

    def _hidden_sum(self) -> Tensor:
        """d_hidden [N, D] of the parts so far."""
        if self._d_hidden is None:
            self._d_hidden = self._projection.hidden.new_zeros(self._projection.hidden.shape, dtype=self._hidden_dtype)
        return self._d_hidden

    def _slabs(self, whole: bool) -> list[slice]:
        """All columns at once, or slabs of them."""
        vocab = self._projection.vocab
        step = vocab if whole else chunking.weight_slab(vocab, self._projection.dim)
        return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]

    def _hidden_product(self, part: _Rows) -> Tensor:
        """d_hidden [L, D] of the rows of a chunk, summed over the ranks of a split head."""
        weight, shard = self._projection.weight, self._projection.shard
        product = weight.new_empty(part.hidden.shape, dtype=self._dtype)
        for here in self._slabs(part.live is None):
            gemm.add_product_(product, part.columns(here), rows_of(weight, here), overwrite=here.start == 0)
        product.mul_(part.row_scale.unsqueeze(1))
        if part.target_grads is not None:
            gemm.add_gathered_rows_(product, weight, part.targets, part.target_grads)
        return product if shard is None else shard.all_reduce_(product)

    def _add_weight(self, d_weight: Tensor, part: _Rows) -> None:
        """d_weight += matrix.T @ (row_scale[:, None] * hidden), and the targets' rows."""
        in_place = self._accumulates and not self._is_fp16
        row_scale, target_grads = part.row_scale, part.target_grads
        if self._scale != 1.0:
            row_scale, target_grads = row_scale * self._scale, None if target_grads is None else target_grads * self._scale
        operand, pow2_scale = gemm.scale_rows(part.hidden, row_scale, self._projection.operand_dtype)
        target_rows = None if target_grads is None else TargetRows.sort(part.targets, part.hidden, target_grads)
        slabs = self._slabs(in_place and part.live is None)
        buffer = None if in_place else operand.new_empty(slabs[0].stop, operand.shape[1], dtype=self._dtype)
        for here in slabs:
            place = rows_of(d_weight, here)
            out = place if buffer is None else rows_of(buffer, slice(0, here.stop - here.start))
            gemm.add_product_(out, part.columns(here).t(), operand, overwrite=not in_place or self._is_new)
            if pow2_scale is not None:
                out.mul_(pow2_scale)
            if target_rows is not None:
                self._add_targets(out, here.start, target_rows)
            if not in_place:
                place.add_(out) if self._accumulates and not self._is_new else place.copy_(out)


def _scaled(gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """scale * gradient in ``dtype``, in place where it has it; one pass. A CPU reads the scale."""
    if gradient is None or scale is None or (not scale.is_cuda and scale == 1):
        return None if gradient is None else gradient.to(dtype)
    return torch.mul(gradient, scale, out=gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype))


Finish = Callable[[Tensor, Projection | None], Gradients]
"""(factor, operands) -> the gradients of a loss times a factor (0-dim), the gradient of a later value with respect to the loss.
operands: the projection of ``one_pass`` again, where it says so. To be called once."""

CoefficientFunction = Callable[[Chunk, slice], Coefficients]
"""(chunk, its rows) -> cotangents of the chunk's statistics, and sums over its tokens."""


def one_pass(
    projection: Projection, targets: Tensor, coefficients: CoefficientFunction, backend: Backend, *,
    entropy: bool, entropy_gradient: bool, needs: tuple[bool, bool, bool], options: Options,
    logp_guess: Tensor | None = None, main_grad: MainGrad | None = None,
) -> tuple[Tensor, Finish, bool]:  # fmt: skip
    """Run all chunks: (sums [len(SUMS)], the function that gives the gradients of the sum ``loss``,
    whether it needs the operands again).

    If all rows are one chunk, its gradient products are left to that function: with the incoming
    gradient in the row factors no pass over d_weight scales it. The chunk's matrix, at most the
    budget, lives until then. Several chunks, ``main_grad`` and a split head compute the products
    here, and the function scales their sum where it rounds it.

    Args:
        projection: the rows that count, M of them.
        targets: [M] int64, of ``Projection.local_targets``.
        coefficients: turns a chunk's statistics into cotangents and sums.
        entropy, entropy_gradient: ``coefficients`` reads entropies, returns cotangents of them.
        backend, needs, main_grad: as in ``GradientSum``; without needs only sums are computed.
        options: memory budget and plan.
        logp_guess: [M] fp32, see ``Backend.open_chunk``, or None.
    """
    hidden, n_rows = projection.hidden, projection.n_rows
    budget = chunking.workspace_bytes(options, hidden.device)
    plan = chunking.one_pass(n_rows, backend.chunk_row_bytes(projection, entropy_gradient), budget, options.plan)
    one_chunk = plan.name == "one_chunk"
    later = one_chunk and n_rows > 0 and any(needs) and main_grad is None and projection.shard is None
    total = None
    if not later:
        # The loss has not been scaled up yet, and fp16 would lose small gradients.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        total = GradientSum(projection, backend, needs, dtype=dtype, one_chunk=one_chunk, main_grad=main_grad)
    sums = gradient = places = None
    for start in range(0, n_rows, plan.rows):
        rows = slice(start, min(start + plan.rows, n_rows))
        chunk = backend.open_chunk(
            projection.rows(rows), rows_of(targets, rows), entropy=entropy, entropy_gradient=entropy_gradient,
            logp_guess=None if logp_guess is None else rows_of(logp_guess, rows),
        )  # fmt: skip
        cotangents, chunk_sums = coefficients(chunk, rows)
        sums = chunk_sums if sums is None else sums + chunk_sums
        if any(needs):
            gradient, live = _move_live_rows(chunk.gradient(cotangents), cotangents)
            places = rows if live is None else start + live
            if total is not None:
                total.add(gradient, places, rows_of(targets, places))
                gradient = None
        del chunk  # before the next one is allocated

    def finish(factor: Tensor, operands: Projection | None) -> Gradients:
        if total is not None:
            return total.result(factor)
        assert gradient is not None
        assert places is not None
        assert operands is not None
        now = GradientSum(operands, backend, needs, dtype=operands.hidden.dtype, one_chunk=True)
        now.add(LogitGradient(gradient.matrix, gradient.scales * factor), places, rows_of(targets, places))
        return now.result()

    return hidden.new_zeros(len(SUMS), dtype=projection.statistics_dtype) if sums is None else sums, finish, later


def _move_live_rows(gradient: LogitGradient, cotangents: LogitCotangents) -> tuple[LogitGradient, Tensor | None]:
    """(the L rows with nonzero cotangents, their places [L] in the chunk), or (gradient, None).

    The rows move to the front of the matrix, in place. (gradient, None) where too few rows are dead
    (clipped tokens, zero advantages) for this to pay, and on CUDA, where the host would wait for L
    in every chunk.
    """
    live = None if gradient.matrix.is_cuda else cotangents.nonzero()
    if live is None or len(live) - int(live.sum()) <= len(live) * _WORTH_MOVING:
        return gradient, None
    places = fill_holes_(gradient.matrix, live)
    return LogitGradient(gradient.matrix[: len(places)], gradient.scales[:, places]), places
