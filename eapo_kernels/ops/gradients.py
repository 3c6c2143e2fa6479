"""Gradients of hidden, weight and bias from the logit gradients of chunks of rows, and the one-pass schedule.

One pass: loss and gradients share a single logit computation per chunk (6NDV operations instead of 8).
Between the first and the second matrix product the statistics of a chunk become coefficients. This is
possible where a token's coefficient depends on its own statistics only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SUMS, Options
from . import chunking, gemm
from .dispatch import Backend, Chunk, Coefficients, LogitGradient, TargetRows
from .lm_head import Projection, fill_holes_, scatter_rows

_WORTH_MOVING = 0.02
"""Share of dead rows above which moving the live rows costs less than multiplying the dead ones by zero."""


class MainGrad(NamedTuple):
    """The caller's accumulator of the weight's gradient.

    Attributes:
        tensor: [V, D] fp32 (fp64 for fp64 inputs), added to.
        scale: factor that the caller will multiply the loss by.
    """

    tensor: Tensor
    scale: float


class GradientSum:
    """d_hidden, d_weight and d_bias, summed over chunks of rows.

    d_weight of several chunks is summed in fp32 and rounded once. One chunk is summed in slabs of the
    vocabulary, each rounded into place, so that there is no fp32 copy. ``main_grad`` is added to in fp32.
    """

    def __init__(
        self,
        projection: Projection,
        backend: Backend,
        needs: tuple[bool, bool, bool],
        *,
        dtype: torch.dtype,
        one_chunk: bool,
        main_grad: MainGrad | None = None,
    ) -> None:
        """
        Args:
            projection: all rows.
            backend: computes the chunks.
            needs: gradients wanted for hidden, weight, bias.
            dtype: of the results.
            one_chunk: ``add`` is called once.
            main_grad: takes d_weight instead of the result, or None.
        """
        p, self._projection = projection, projection
        self._add_target_rows, self._dtype, self._stored = backend.add_target_rows, p.statistics_dtype, dtype
        self._scale = 1.0 if main_grad is None else main_grad.scale
        self._is_fp16 = p.operand_dtype == torch.float16
        self._accumulates = main_grad is not None or not one_chunk or dtype == self._dtype
        zeros = torch.zeros_like
        self.d_hidden = zeros(p.hidden, dtype=dtype, memory_format=torch.contiguous_format) if needs[0] else None
        self._d_weight = self._d_bias = None
        if needs[1]:
            own = self._dtype if self._accumulates else dtype
            self._d_weight = (
                zeros(p.weight, dtype=own, memory_format=torch.contiguous_format) if main_grad is None else main_grad.tensor
            )
        self._returns_weight = main_grad is None
        if needs[2]:
            self._d_bias = p.weight.new_zeros(p.vocab, dtype=self._dtype)

    def add(self, gradient: LogitGradient, rows: slice | Tensor, targets: Tensor, live: Tensor | None = None) -> None:
        """Take in a chunk.

        Args:
            gradient: of C rows.
            rows: their places in the projection.
            targets: [C] int64.
            live: [L] places in the chunk of the rows whose gradient is not zero, the only ones to be multiplied; or None.
        """
        hidden, n_rows = self._projection.hidden[rows], gradient.matrix.shape[0]
        matrix, row_scale, target_grads = gradient
        if live is not None:
            hidden, targets, row_scale = hidden[live], targets[live], row_scale[live]
            target_grads = None if target_grads is None else target_grads[live]
        if row_scale.numel() == 0:
            return

        def columns(here: slice) -> Tensor:
            return matrix[:, here] if live is None else matrix[live, here]

        if self.d_hidden is not None:
            product = self._hidden_product(columns, row_scale, target_grads, targets, gathered=live is not None)
            self.d_hidden[rows] = scatter_rows(product, live, n_rows).to(self._stored)
            del product
        if self._d_weight is not None:
            self._add_weight(columns, row_scale, target_grads, targets, hidden, gathered=live is not None)
        if self._d_bias is not None:
            for here in self._slabs(live is None):
                gemm.add_weighted_rows_(self._d_bias[here], columns(here), row_scale)
            if target_grads is not None:
                rows_of_ones = TargetRows.sort(targets, target_grads.new_ones(len(targets), 1), target_grads)
                self._add_targets(self._d_bias.unsqueeze(1), 0, rows_of_ones)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_hidden, d_weight, d_bias), None where not needed; d_weight also where ``main_grad`` took it."""
        d_weight = self._d_weight.to(self._stored) if self._d_weight is not None and self._returns_weight else None
        return self.d_hidden, d_weight, None if self._d_bias is None else self._d_bias.to(self._stored)

    def _slabs(self, whole: bool) -> list[slice]:
        """All columns at once, or slabs of them."""
        vocab, dim = self._projection.weight.shape
        step = vocab if whole else chunking.weight_slab(vocab, dim)
        return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]

    def _hidden_product(
        self,
        columns: Callable[[slice], Tensor],
        row_scale: Tensor,
        target_grads: Tensor | None,
        targets: Tensor,
        gathered: bool,
    ) -> Tensor:
        """d_hidden [L, D] of the rows of a chunk, summed over the ranks of a split head."""
        weight, shard = self._projection.weight, self._projection.shard
        product = weight.new_empty(len(row_scale), self._projection.dim, dtype=self._dtype)
        for here in self._slabs(not gathered):
            gemm.add_product_(product, columns(here), weight[here], overwrite=here.start == 0)
        product.mul_(row_scale.unsqueeze(1))
        if target_grads is not None:
            gemm.add_gathered_rows_(product, weight, targets, target_grads)
        return product if shard is None else shard.all_reduce_(product)

    def _add_weight(
        self,
        columns: Callable[[slice], Tensor],
        row_scale: Tensor,
        target_grads: Tensor | None,
        targets: Tensor,
        hidden: Tensor,
        gathered: bool,
    ) -> None:
        """d_weight += matrix.T @ (row_scale[:, None] * hidden), and the targets' rows."""
        assert self._d_weight is not None
        d_weight, in_place = self._d_weight, self._accumulates and not self._is_fp16
        operand, pow2_scale = gemm.scale_rows(
            hidden, row_scale if self._is_fp16 else row_scale * self._scale, self._projection.operand_dtype
        )
        target_rows = None if target_grads is None else TargetRows.sort(targets, hidden, target_grads * self._scale)
        slabs = self._slabs(in_place and not gathered)
        buffer = None if in_place else operand.new_empty(slabs[0].stop, self._projection.dim, dtype=self._dtype)
        for here in slabs:
            out = d_weight[here] if buffer is None else buffer[: here.stop - here.start]
            gemm.add_product_(out, columns(here).t(), operand, overwrite=not in_place)
            if pow2_scale is not None:
                out.mul_(pow2_scale * self._scale)
            if target_rows is not None:
                self._add_targets(out, here.start, target_rows)
            if not in_place and self._accumulates:
                d_weight[here] += out
            elif not in_place:
                d_weight[here] = out

    def _add_targets(self, out: Tensor, first: int, rows: TargetRows) -> None:
        assert self._add_target_rows is not None
        self._add_target_rows(out, first, rows)


CoefficientFunction = Callable[[Chunk, slice], Coefficients]
"""(chunk, its rows) -> cotangents of the chunk's statistics, and sums to log."""


def one_pass(
    projection: Projection,
    targets: Tensor,
    coefficients: CoefficientFunction,
    backend: Backend,
    *,
    entropy: bool,
    entropy_gradient: bool,
    needs: tuple[bool, bool, bool],
    options: Options,
    logp_guess: Tensor | None = None,
    main_grad: MainGrad | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Run all chunks: (sums [len(SUMS)], (d_hidden, d_weight, d_bias) of the loss sum, None where not needed).

    The gradients have the inputs' dtypes, but fp32 for fp16 inputs: the loss has not been scaled up yet,
    and fp16 would lose small gradients.

    Args:
        projection: the rows that count, M of them.
        targets: [M] int64, valid tokens of the full vocabulary.
        coefficients: turns a chunk's statistics into cotangents and sums.
        backend: computes the chunks.
        entropy: the coefficient function reads entropies.
        entropy_gradient: the coefficient function returns a cotangent of the entropy.
        needs: gradients wanted for hidden, weight, bias; without any only the sums are computed.
        options: memory budget and plan.
        logp_guess: [M] fp32, see ``Backend.open_chunk``, or None.
        main_grad: takes d_weight instead of the result, or None.
    """
    hidden = projection.hidden
    targets = projection.local_targets(targets)
    budget = chunking.workspace_bytes(options, hidden.device)
    row_bytes = backend.chunk_row_bytes(projection, entropy_gradient)
    plan = chunking.one_pass(projection.n_rows, row_bytes, budget, options.plan)
    stored = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # weight and bias have hidden's dtype
    one_chunk = plan.name == "one_chunk"
    total = GradientSum(projection, backend, needs, dtype=stored, one_chunk=one_chunk, main_grad=main_grad)
    sums = hidden.new_zeros(len(SUMS), dtype=projection.statistics_dtype)
    for start in range(0, projection.n_rows, plan.rows):
        rows = slice(start, min(start + plan.rows, projection.n_rows))
        chunk = backend.open_chunk(
            projection.rows(rows), targets[rows], entropy=entropy, entropy_gradient=entropy_gradient,
            logp_guess=None if logp_guess is None else logp_guess[rows],
        )  # fmt: skip
        cotangents, chunk_sums = coefficients(chunk, rows)
        sums += chunk_sums
        if any(needs):
            gradient = chunk.gradient(cotangents)
            live = None if hidden.is_cuda else _move_live_rows(gradient.matrix, cotangents.nonzero())
            if live is None:
                total.add(gradient, rows, targets[rows])
            else:
                places = rows.start + live
                target_grads = None if gradient.target_grads is None else gradient.target_grads[live]
                front = LogitGradient(gradient.matrix[: len(live)], gradient.row_scale[live], target_grads)
                total.add(front, places, targets[places])
            del gradient
        del chunk  # before the next one is allocated
    return sums, total.result()


def _move_live_rows(matrix: Tensor, live: Tensor) -> Tensor | None:
    """Move the ``live`` [C] rows to the front of ``matrix`` [C, V] where leaving out the others pays; their places, or None.

    A row is dead where its token was clipped or has no advantage. On a CPU only: on CUDA the host would
    wait for the number of live rows in the middle of the loop.
    """
    dead = len(live) - int(live.sum())
    return fill_holes_(matrix, live) if dead > len(live) * _WORTH_MOVING else None
