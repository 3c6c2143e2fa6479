"""d_weight of the one-pass schedule, summed over chunks of rows: where it is kept and how often it is rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import plans, products
from .backend import ChunkGradient, TargetRows
from .projection import Projection


class MainGrad(NamedTuple):
    """The caller's own accumulator of the weight's gradient.

    Attributes:
        tensor: [V, D] fp32 (fp64 for fp64 inputs), added to.
        scale: factor that the caller will put on the loss.
    """

    tensor: Tensor
    scale: float


class WeightGradient:
    """Sum over chunks of matrix.T @ (row_factor[:, None] * hidden), and of the targets' rows where they are apart, [V, D].

    Several chunks: an fp32 accumulator, rounded once at the end. One chunk: products of slabs of the vocabulary, each rounded
    into place, so that there is no fp32 copy. ``main_grad``: added to it in fp32, whatever the number of chunks.

    With fp16 operands a power of two a chunk (``products.scale_rows``) and the scale are multiplied in after the product.
    """

    def __init__(
        self,
        projection: Projection,
        stored: torch.dtype,
        *,
        one_chunk: bool,
        main_grad: MainGrad | None,
        add_target_rows: Callable[[Tensor, int, TargetRows], None] | None = None,
    ) -> None:
        """
        Args:
            projection: whose weight it is.
            stored: dtype of the result.
            one_chunk: ``add`` is called at most once.
            main_grad: where to add to, or None.
            add_target_rows: see ``backend.Backend``.
        """
        self._add_target_rows = add_target_rows
        self._dtype, self._stored, self._main = projection.statistics_dtype, stored, main_grad
        self._scale = 1.0 if main_grad is None else main_grad.scale
        self._half = projection.operand_dtype == torch.float16
        self._accumulates = main_grad is not None or not one_chunk or stored == self._dtype
        self._whole_products = self._accumulates and not self._half
        if main_grad is not None:
            self._sum = main_grad.tensor
        else:
            dtype = self._dtype if self._accumulates else stored
            self._sum = torch.zeros_like(projection.weight, dtype=dtype, memory_format=torch.contiguous_format)

    def add(self, gradient: ChunkGradient, hidden: Tensor, targets: Tensor) -> None:
        """Take in a chunk. hidden: [C, D] operand dtype or narrower; targets: [C] int64."""
        matrix, row_factor, target = gradient
        if row_factor.numel() == 0:
            return
        scaled, unit = products.scale_rows(hidden, row_factor if self._half else row_factor * self._scale, matrix.dtype)
        if unit is not None:
            unit = unit * self._scale
        apart = None if target is None else TargetRows.sort(targets, hidden, target * self._scale)
        if self._whole_products:
            products.add_product_(self._sum, matrix.t(), scaled)
            self._add_targets(self._sum, 0, apart)
            return
        vocab, dim = self._sum.shape
        step = plans.columns_at_once(vocab, dim)
        buffer = scaled.new_empty(step, dim, dtype=self._dtype)
        for start in range(0, vocab, step):
            here = slice(start, min(start + step, vocab))
            slab = buffer[: here.stop - start]
            products.add_product_(slab, matrix[:, here].t(), scaled, overwrite=True)
            if unit is not None:
                slab.mul_(unit)
            self._add_targets(slab, start, apart)
            if self._accumulates:
                self._sum[here] += slab
            else:
                self._sum[here] = slab

    def _add_targets(self, out: Tensor, first: int, rows: TargetRows | None) -> None:
        if rows is not None:
            assert self._add_target_rows is not None
            self._add_target_rows(out, first, rows)

    def result(self) -> Tensor | None:
        """[V, D] in the stored dtype; None where it went into ``main_grad``."""
        return None if self._main is not None else self._sum.to(self._stored)
