"""One chunk of the one-pass schedule: raw logits by one large product, two passes of a row kernel around ``finalize``.

The chunk's logits live once, in fp32, between ``open_chunk`` and ``Chunk.gradient``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import plans, products
from ..backend import ChunkGradient, Coefficients, LogitCotangents, SurrogateTerms
from ..projection import Projection
from ..statistics import RowStatistics
from .finalize import Finalized, finalize
from .rows import row_gradient, row_statistics


def workspace(projection: Projection, dtype: torch.dtype) -> Tensor:
    """[N, V] uninitialised, with padded rows."""
    n_rows, vocab = projection.n_rows, projection.vocab
    return projection.hidden.new_empty(n_rows, plans.padded(vocab), dtype=dtype)[:, :vocab]


class TritonChunk:
    """See ``backend.Chunk``."""

    def __init__(self, projection: Projection, targets: Tensor, entropy: bool) -> None:
        self._projection, self._targets = projection, targets
        raw = workspace(projection, torch.float32)
        self._raw: Tensor | None = products.project_(raw, projection.hidden, projection.weight)
        launch, self._sums = row_statistics(raw, projection, targets, entropy=entropy)
        launch()
        self._final: Finalized | None = None

    def _finalize(self, terms: SurrogateTerms | None) -> Finalized:
        launch, final = finalize(self._sums, terms)
        launch()
        self._final = final
        return final

    def statistics(self) -> RowStatistics:
        """One launch; see ``backend.Chunk``."""
        return self._finalize(None).statistics

    def surrogate(self, terms: SurrogateTerms) -> Coefficients:
        """One launch; see ``backend.Backend``."""
        return self._finalize(terms).coefficients()

    def gradient(self, cotangents: LogitCotangents) -> ChunkGradient:
        """One launch; in place where the operands of the products are fp32. See ``backend.Chunk``.

        The row factors are 1, but for fp16 operands the power of two that brings each row's cotangents near 1.
        """
        assert self._raw is not None, "gradient: expected one call per chunk, got a second one"
        raw, self._raw = self._raw, None
        statistics = (self._final or self._finalize(None)).statistics
        dtype = self._projection.operand_dtype
        matrix = raw if dtype == raw.dtype else workspace(self._projection, dtype)
        factor = torch.ones_like(statistics.logp)
        if dtype == torch.float16:
            factor = cotangents.power_of_two()
            cotangents = cotangents.map(lambda c: c / factor)
        row_gradient(matrix, raw, self._projection, self._targets, statistics, cotangents)()
        return ChunkGradient(matrix, factor)


def open_chunk(projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool) -> TritonChunk:
    """See ``backend.OpenChunk``. The logits are kept, so any cotangent can follow."""
    return TritonChunk(projection, targets, entropy or entropy_gradient)


def chunk_bytes(projection: Projection) -> int:
    """fp32 logits and, where the products want another dtype, the gradient matrix."""
    dtype = projection.operand_dtype
    return 4 if dtype == torch.float32 else 4 + dtype.itemsize
