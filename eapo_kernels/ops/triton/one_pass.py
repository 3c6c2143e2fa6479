"""One chunk of the one-pass schedule, in one of two forms; ``form`` decides which.

exponentials (E11, E12): the first product's epilogue stores E = e^(z - k) in the operands' dtype; no other kernel reads it all.
logits: raw fp32 logits by the library's product, then two passes of a row kernel around ``finalize``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from .. import plans, products
from ..backend import Chunk, ChunkGradient, Coefficients, LogitCotangents, SurrogateTerms
from ..projection import Projection
from ..statistics import RowStatistics
from . import configs
from .finalize import Finalized, finalize
from .launch import family, product_tile
from .offsets import ScaledExpSums, row_offsets
from .rows import row_gradient, row_statistics
from .scaled_exp_finalize import scaled_exp_finalize
from .scaled_exp_gemm import scaled_exp_gemm
from .scaled_exp_rescue import rescue
from .scaled_exp_split import fit_slopes, gather_sums, share_offsets


class Form(NamedTuple):
    """What a chunk keeps between its two products, and why."""

    name: Literal["exponentials", "logits"]
    reason: str


def form(projection: Projection, entropy_gradient: bool) -> Form:
    """The form of a chunk. Exponentials wherever they say all that the gradient needs and save something."""
    if entropy_gradient:
        return Form("logits", "the entropy's gradient needs each logit, not only its exponential")
    if projection.softcap is not None:
        return Form("logits", "a soft-cap's slope needs each logit")
    if projection.hidden.dtype == torch.float32:
        return Form("logits", "fp32 logits become the gradient in place, and the library multiplies fp32 better")
    return Form("exponentials", "half the memory, no pass over the chunk, statistics from fp32 accumulators")


def workspace(projection: Projection, dtype: torch.dtype) -> Tensor:
    """[N, V] uninitialised, with padded rows."""
    n_rows, vocab = projection.n_rows, projection.vocab
    return projection.hidden.new_empty(n_rows, plans.padded(vocab), dtype=dtype)[:, :vocab]


class FinalizedChunk(ABC):
    """What both forms share: their sums are finished in one launch, with or without a surrogate."""

    @abstractmethod
    def _finalize(self, terms: SurrogateTerms | None) -> Finalized: ...

    def statistics(self) -> RowStatistics:
        """One launch; see ``backend.Chunk``."""
        return self._finalize(None).statistics

    def surrogate(self, terms: SurrogateTerms) -> Coefficients:
        """One launch; see ``backend.Backend``."""
        return self._finalize(terms).coefficients()


class LogitChunk(FinalizedChunk):
    """See ``backend.Chunk``. The logits live once, in fp32, until ``gradient``; any cotangent may follow."""

    def __init__(self, projection: Projection, targets: Tensor, *, entropy: bool) -> None:
        self._projection, self._targets = projection, targets
        raw = workspace(projection, torch.float32)
        self._raw: Tensor | None = products.project_(raw, projection.hidden, projection.weight)
        launch, sums = row_statistics(raw, projection, targets, entropy=entropy)
        launch()
        self._sums = sums.whole(projection.shard, targets)
        self._final: Finalized | None = None

    def _finalize(self, terms: SurrogateTerms | None) -> Finalized:
        launch, final = finalize(self._sums, terms)
        launch()
        self._final = final
        return final

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


class ScaledExpKernels(NamedTuple):
    """The first product of the scaled-exponential form, which a backend may replace by one with the same outputs.

    Attributes:
        sums: allocates the ``ScaledExpSums`` of ``product``.
        product: see ``scaled_exp_gemm.scaled_exp_gemm``.
    """

    sums: Callable[[Projection, bool], ScaledExpSums] = ScaledExpSums.empty
    product: Callable[..., Callable[[], None]] = scaled_exp_gemm


class ScaledExpChunk(FinalizedChunk):
    """See ``backend.Chunk``. No logit is kept: only a cotangent of logp may follow. ``row_max`` of its statistics is an offset.

    Attributes:
        sums: offsets and partial sums; ``sums.n_rescue`` [1] int32 says on the device how many rows had to be redone.
    """

    def __init__(
        self,
        projection: Projection,
        targets: Tensor,
        logp_guess: Tensor | None,
        *,
        entropy: bool,
        kernels: ScaledExpKernels | None = None,
    ) -> None:
        kernels = kernels or ScaledExpKernels()
        self._projection, self._targets = projection, targets
        self.sums = kernels.sums(projection, entropy)
        matrix = workspace(projection, projection.operand_dtype)
        row_offsets(projection, targets, logp_guess, self.sums)()
        if projection.shard is not None:
            share_offsets(projection, targets, logp_guess, self.sums)
        kernels.product(projection, targets, self.sums, matrix)()
        rescue(projection, targets, self.sums, matrix)
        self._whole = self.sums if projection.shard is None else gather_sums(projection.shard, self.sums)
        self._matrix: Tensor | None = matrix
        self._slopes: Tensor | None = None

    def _finalize(self, terms: SurrogateTerms | None) -> Finalized:
        launch, final, slopes = scaled_exp_finalize(self._projection, self._whole, terms)
        launch()
        if self._projection.shard is not None:
            slopes = fit_slopes(slopes, self._targets, self.sums, self._whole, final.statistics)
        self._slopes = slopes
        return final

    def gradient(self, cotangents: LogitCotangents) -> ChunkGradient:
        """No launch over the matrix: row factors -(cotangent) * slope / S, targets' entries (cotangent) * slope * R / S (E12).

        See ``backend.Chunk``.
        """
        assert self._matrix is not None, "gradient: expected one call per chunk, got a second one"
        assert cotangents.logp is not None
        assert cotangents.entropy is None
        assert cotangents.lse is None
        if self._slopes is None:
            self._finalize(None)
        assert self._slopes is not None
        matrix, self._matrix = self._matrix, None
        return ChunkGradient(matrix, *(cotangents.logp * self._slopes))


def open_chunk(
    projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool, logp_guess: Tensor | None = None
) -> Chunk:
    """See ``backend.OpenChunk``."""
    if form(projection, entropy_gradient).name == "logits":
        return LogitChunk(projection, targets, entropy=entropy or entropy_gradient)
    return ScaledExpChunk(projection, targets, logp_guess, entropy=entropy)


_LEAST_BLOCK_V = 64
"""Columns of the narrowest tile of ``scaled_exp_gemm``."""


def chunk_row_bytes(projection: Projection, entropy_gradient: bool) -> int:
    """Exponentials: the gradient's matrix. Logits: fp32, and the gradient's matrix if not fp32. Both: partial sums a tile.

    With the vocabulary split it is the same on all processes, whose tiles may differ with the size of their shards.
    """
    dtype, vocab = projection.operand_dtype, projection.max_shard_vocab
    if form(projection, entropy_gradient).name == "exponentials":
        block = product_tile("scaled_exp_gemm", projection).block_v if projection.shard is None else _LEAST_BLOCK_V
        sums = 8 * triton.cdiv(vocab, block)
        return plans.padded(vocab) * dtype.itemsize + sums
    sums = 16 * triton.cdiv(vocab, configs.find("row_statistics", family(projection.hidden.device), 4).block_v)
    return plans.padded(vocab) * (4 if dtype == torch.float32 else 4 + dtype.itemsize) + sums


def surrogate(chunk: FinalizedChunk, terms: SurrogateTerms) -> Coefficients:
    """See ``backend.Backend``."""
    return chunk.surrogate(terms)
