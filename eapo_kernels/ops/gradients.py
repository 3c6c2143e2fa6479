"""Gradients of hidden, weight and bias from logit gradients of chunks, and the one-pass schedule.

One pass: loss and gradients share a single logit computation per chunk (6NDV operations instead of
8NDV). Between the first and the second matrix product a coefficient function turns the statistics
of a chunk into cotangents. So a token's cotangents can depend on its own statistics only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SUMS, Options, rows_of
from . import chunking, gemm
from .dispatch import Backend, Chunk, Coefficients, Entries, LogitCotangents, LogitGradient, WeightedRows
from .lm_head import Projection, fill_holes_, scatter_rows
from .sparsify import Sparsity, applies, sparsify

_WORTH_MOVING = 0.02  # share of rows with zero gradient above which moving the others to the front pays

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # d_hidden, d_weight, d_bias; None where not needed


class MainGrad(NamedTuple):
    """The caller's accumulator of the weight's gradient."""

    tensor: Tensor  # [V, D] fp32 (fp64 for fp64 inputs), added to
    scale: float  # the caller will multiply the loss by it


class _Rows(NamedTuple):
    """The L rows of a chunk that are multiplied."""

    matrix: Tensor  # [C, V], of LogitGradient
    live: Tensor | None  # [L], places of the rows in the matrix; None: all C rows
    row_scale: Tensor  # [L], of LogitGradient
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
        self._projection, self._add_rows, self._dtype = p, backend.add_rows, p.statistics_dtype
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

    def add(self, gradient: LogitGradient, rows: slice | Tensor, live: Tensor | None = None) -> None:
        """Add the gradients of R rows: ``rows`` of the projection.

        live: [L] places in the matrix of the rows with a gradient that is not zero; only these are
        multiplied. None: all of its rows.
        """
        hidden, (matrix, row_scale, entries) = rows_of(self._projection.hidden, rows), gradient
        dense = None
        if matrix is not None:
            assert row_scale is not None
            own = rows_of(hidden, slice(0, len(matrix))) if live is None else hidden[live]
            dense = _Rows(matrix, live, row_scale if live is None else row_scale[live], own)
            dense = dense if len(own) else None
        if dense is None and entries is None:
            return
        if self._hidden_dtype is not None:
            d_hidden = self._hidden_product(dense, entries, len(hidden)).to(self._hidden_dtype)
            if hidden is self._projection.hidden:
                self._d_hidden = d_hidden
            else:
                self._hidden_sum()[rows] = d_hidden
        if self._d_weight is not None:
            self._add_weight(self._d_weight, dense, None if entries is None else entries.by_column(hidden))
            self._is_new = False
        if self._d_bias is not None:
            if dense is not None:
                for here in self._slabs(live is None):
                    gemm.add_weighted_rows_(rows_of(self._d_bias, here), dense.columns(here), dense.row_scale)
            if entries is not None:
                ones = entries.values.new_ones(1, 1).expand(len(hidden), 1)
                self._add_rows(self._d_bias.unsqueeze(1), 0, entries.by_column(ones))

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

    def _hidden_product(self, dense: _Rows | None, entries: Entries | None, n_rows: int) -> Tensor:
        """d_hidden [R, D] of the rows of a chunk, summed over the ranks of a split head."""
        weight, shard = self._projection.weight, self._projection.shard
        part = weight.new_zeros if dense is None else weight.new_empty
        count = n_rows if dense is None else len(dense.hidden)
        product = part((count, weight.shape[1]), dtype=self._dtype)
        if dense is not None:
            for here in self._slabs(dense.live is None):
                gemm.add_product_(product, dense.columns(here), rows_of(weight, here), overwrite=here.start == 0)
            product.mul_(dense.row_scale.unsqueeze(1))
            if dense.live is not None:
                product = scatter_rows(product, dense.live, n_rows)
            elif count < n_rows:
                product = torch.cat([product, product.new_zeros(n_rows - count, product.shape[1])])
        if entries is not None:
            self._add_rows(product, 0, entries.by_row(weight))
        return product if shard is None else shard.all_reduce_(product)

    def _add_weight(self, d_weight: Tensor, dense: _Rows | None, entries: WeightedRows | None) -> None:
        """d_weight += matrix.T @ (row_scale[:, None] * hidden), and the entries by column."""
        in_place = self._accumulates and not self._is_fp16
        operand = pow2_scale = None
        if dense is not None:
            row_scale = dense.row_scale if self._scale == 1 else dense.row_scale * self._scale
            operand, pow2_scale = gemm.scale_rows(dense.hidden, row_scale, self._projection.operand_dtype)
        if entries is not None and self._scale != 1:
            entries = entries._replace(values=entries.values * self._scale)
        slabs = self._slabs(in_place and (dense is None or dense.live is None))
        buffer = None if in_place else d_weight.new_empty(slabs[0].stop, d_weight.shape[1], dtype=self._dtype)
        for here in slabs:
            place = rows_of(d_weight, here)
            out = place if buffer is None else rows_of(buffer, slice(0, here.stop - here.start))
            overwrite = not in_place or self._is_new
            if dense is not None and operand is not None:
                gemm.add_product_(out, dense.columns(here).t(), operand, overwrite=overwrite)
            elif overwrite:
                out.zero_()
            if pow2_scale is not None:
                out.mul_(pow2_scale)
            if entries is not None:
                self._add_rows(out, here.start, entries)
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
    projection: Projection, targets: Tensor, backend: Backend, open_chunk: Callable[[slice], Chunk],
    coefficients: CoefficientFunction, *, row_bytes: int, needs: tuple[bool, bool, bool], options: Options,
    main_grad: MainGrad | None = None,
) -> tuple[Tensor, Finish, bool, Sparsity | None]:  # fmt: skip
    """Run all chunks: (sums [len(SUMS)], the function that gives the gradients of the sum ``loss``,
    whether it needs the operands again, what became of the rows under ``Options.gradient_tolerance``,
    or None without one).

    If all rows are one chunk, its gradient products are left to that function: with the incoming
    gradient in the row factors no pass over d_weight scales it. The chunk's matrix, at most the
    budget, lives until then. Several chunks, ``main_grad`` and a split head compute the products
    here, and the function scales their sum where it rounds it.

    Args:
        projection, backend, needs, main_grad: as in ``GradientSum``, the rows that count; without
            needs only sums are computed.
        targets: [M] int64, their columns.
        open_chunk: makes the chunk of some of the rows.
        coefficients: turns a chunk's statistics into cotangents and sums.
        row_bytes: workspace of a chunk for each of its rows.
        options: memory budget, plan, tolerance of the gradient.
    """
    hidden, n_rows = projection.hidden, projection.n_rows
    plan = chunking.one_pass(n_rows, row_bytes, chunking.workspace_bytes(options, hidden.device), options.plan)
    one_chunk = plan.name == "one_chunk"
    later = one_chunk and n_rows > 0 and any(needs) and main_grad is None and projection.shard is None
    total = None
    if not later:
        # The loss has not been scaled up yet, and fp16 would lose small gradients.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        total = GradientSum(projection, backend, needs, dtype=dtype, one_chunk=one_chunk, main_grad=main_grad)
    tallies: list[Tensor] = []
    sums = gradient = places = None
    for start in range(0, n_rows, plan.rows):
        rows = slice(start, min(start + plan.rows, n_rows))
        chunk = open_chunk(rows)
        cotangents, chunk_sums = coefficients(chunk, rows)
        sums = chunk_sums if sums is None else sums + chunk_sums
        if any(needs):
            gradient, live = _move_live_rows(chunk.gradient(cotangents), cotangents)
            places = rows if live is None else start + live
            if options.gradient_tolerance is not None and applies(projection, gradient, cotangents):
                gradient, order, tally = sparsify(gradient, targets[places], options.gradient_tolerance)
                tallies.append(tally)
                if order is not None:
                    places = start + (order if live is None else live[order])
            if total is not None:
                total.add(gradient, places)
                gradient = None
        del chunk  # before the next one is allocated

    def finish(factor: Tensor, operands: Projection | None) -> Gradients:
        if total is not None:
            return total.result(factor)
        assert gradient is not None
        assert places is not None
        assert operands is not None
        now = GradientSum(operands, backend, needs, dtype=operands.hidden.dtype, one_chunk=True)
        now.add(gradient.scaled(factor), places)
        return now.result()

    if sums is None:
        sums = hidden.new_zeros(len(SUMS), dtype=projection.statistics_dtype)
    sparsity = None if options.gradient_tolerance is None else Sparsity.of(tallies or [sums.new_zeros(5)])
    return sums, finish, later, sparsity


def _move_live_rows(gradient: LogitGradient, cotangents: LogitCotangents) -> tuple[LogitGradient, Tensor | None]:
    """(the L rows with nonzero cotangents, their places [L] in the chunk), or (gradient, None).

    The rows move to the front of the matrix, in place. (gradient, None) where too few rows are dead
    (clipped tokens, zero advantages) for this to pay, and on CUDA, where the host would wait for L
    in every chunk.
    """
    matrix, row_scale, entries = gradient
    if matrix is None or row_scale is None or matrix.is_cuda:
        return gradient, None
    live = cotangents.nonzero()
    if len(live) - int(live.sum()) <= len(live) * _WORTH_MOVING:
        return gradient, None
    places = fill_holes_(matrix, live)
    if entries is not None:  # one a row
        entries = Entries.one_a_row(entries.ids[places], entries.values[places])
    return LogitGradient(matrix[: len(places)], row_scale[places], entries), places
