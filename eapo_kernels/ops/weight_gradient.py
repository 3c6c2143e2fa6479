"""d_weight of the one-pass schedule, summed over chunks of rows: where it is kept and how often it is rounded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import plans, products
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
    """Sum over chunks of matrix.T @ (row_factor[:, None] * hidden), [V, D].

    Several chunks: an fp32 accumulator, rounded once at the end. One chunk: products of slabs of the vocabulary, each rounded
    into place, so that there is no fp32 copy. ``main_grad``: added to it in fp32, whatever the number of chunks.
    """

    def __init__(
        self, projection: Projection, stored: torch.dtype, *, unit: float, one_chunk: bool, main_grad: MainGrad | None
    ) -> None:
        """
        Args:
            projection: whose weight it is.
            stored: dtype of the result.
            unit: power of two that is taken out of the operands of the products.
            one_chunk: ``add`` is called at most once.
            main_grad: where to add to, or None.
        """
        self._dtype, self._stored, self._unit, self._main = projection.statistics_dtype, stored, unit, main_grad
        self._scale = 1.0 if main_grad is None else main_grad.scale
        weight = projection.weight
        in_place = main_grad is None and (not one_chunk or stored == self._dtype)
        self._whole_products = in_place or (main_grad is not None and unit == 1.0)
        if main_grad is not None:
            self._sum = main_grad.tensor
        else:
            dtype = self._dtype if in_place else stored
            self._sum = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format)

    def add(self, matrix: Tensor, hidden: Tensor, row_factor: Tensor) -> None:
        """Take in a chunk. matrix: [C, V] operand dtype; hidden: [C, D] operand dtype or narrower; row_factor: [C]."""
        scaled = (hidden * (row_factor * (self._scale / self._unit)).unsqueeze(1)).to(matrix.dtype)
        if self._whole_products:
            products.add_product_(self._sum, matrix.t(), scaled)
            return
        vocab, dim = self._sum.shape
        step = plans.columns_at_once(vocab, dim)
        buffer = scaled.new_empty(step, dim, dtype=self._dtype)
        for start in range(0, vocab, step):
            here = slice(start, min(start + step, vocab))
            slab = buffer[: here.stop - start]
            products.add_product_(slab, matrix[:, here].t(), scaled, overwrite=True)
            if self._main is None:
                self._sum[here] = slab.mul_(self._unit)
            else:
                self._sum[here].add_(slab, alpha=self._unit)

    def result(self) -> Tensor | None:
        """[V, D] in the stored dtype; None where it went into ``main_grad``."""
        if self._main is not None:
            return None
        if self._whole_products and self._unit != 1.0:
            self._sum.mul_(self._unit)
        return self._sum.to(self._stored)
