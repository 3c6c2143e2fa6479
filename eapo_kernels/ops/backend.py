"""What a backend is: a frozen record of functions over a ``Projection``. The loops around them are shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .projection import Projection
from .statistics import RowStatistics
from .vocab_parallel import NOWHERE


class LogitCotangents(NamedTuple):
    """dL/dlogp, dL/dentropy, dL/dlse of every row ([N] statistics dtype, None = zero): all a backward pass needs (E6)."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LogitCotangents:
        """The same record with a function applied to every tensor that is there."""
        return LogitCotangents._make(None if t is None else function(t) for t in self)

    def power_of_two(self) -> Tensor:
        """[N] powers of two at the size of each row's largest cotangent, 1 where all are zero: what fp16 operands leave out."""
        largest = torch.stack([c.abs() for c in self if c is not None]).amax(0)
        return torch.where(largest > 0, torch.exp2(largest.log2().floor()), 1.0)

    def rows(self, index: slice | Tensor) -> LogitCotangents:
        """The cotangents of some of the rows."""
        return self.map(lambda t: t[index])


class Statistics(Protocol):
    """Statistics of every row, reading each logit once and storing none beyond ``budget`` bytes."""

    def __call__(
        self, projection: Projection, targets: Tensor, *, entropy: bool, second_moments: bool, budget: int
    ) -> RowStatistics: ...


class LogitGradient(Protocol):
    """dL/d(hidden @ weight.T + bias) for a slab of columns into ``out`` [N, columns] (E6), recomputing the logits.

    ``out`` has the projection's operand dtype. ``gain`` (a power of two, 0-dim) multiplies the result so that fp16 does not
    underflow; None means 1.
    """

    def __call__(
        self,
        out: Tensor,
        projection: Projection,
        targets: Tensor,
        columns: slice,
        statistics: RowStatistics,
        cotangents: LogitCotangents,
        gain: Tensor | None,
    ) -> None: ...


class ChunkGradient(NamedTuple):
    """dL/d(hidden @ weight.T + bias) of a chunk: ``row_factor[:, None] * matrix``, and ``target`` more at each row's target.

    The target's entry is by far a row's largest: kept apart it is not rounded to the operands' dtype.

    Attributes:
        matrix: [C, V] operand dtype.
        row_factor: [C] statistics dtype.
        target: [C] statistics dtype, and zeros in the matrix at the targets; None: the matrix is whole.
    """

    matrix: Tensor
    row_factor: Tensor
    target: Tensor | None = None

    def front(self, rows: Tensor) -> ChunkGradient:
        """Of the rows [L] alone, which stand at the front of the matrix already."""
        target = None if self.target is None else self.target[rows]
        return ChunkGradient(self.matrix[: len(rows)], self.row_factor[rows], target)


class TargetRows(NamedTuple):
    """Rows to be added to the rows of d_weight that belong to their targets.

    Attributes:
        targets: [C] int64, sorted; NOWHERE where the factor is zero.
        order: [C] int64, the row at each place of ``targets``.
        hidden: [C, D].
        factor: [C] statistics dtype, by row.
    """

    targets: Tensor
    order: Tensor
    hidden: Tensor
    factor: Tensor

    @staticmethod
    def sort(targets: Tensor, hidden: Tensor, factor: Tensor) -> TargetRows:
        """In the order of their targets, equal ones as they come. targets: [C] int64.

        Rows of factor zero get out of the way: left-out rows all stand at one target, whose owner would add them one by one.
        """
        return TargetRows(*torch.where(factor == 0, NOWHERE, targets).sort(stable=True), hidden, factor)


@dataclass(frozen=True)
class SurrogateTerms:
    """A clipped, sign-weighted policy surrogate as numbers per token and per sequence (E9, E10), for one fused launch.

    With i the sequence of token t, w_i = ``positive_weight`` where rewards_i > thresholds_i and ``negative_weight`` elsewhere,
    rho = exp(clamp(logp - old_logp, -60, 60)) and c(rho) = clamp(rho, 1 - clip_low, 1 + clip_high):

        surrogate_t = min(rho * A_i, c(rho) * A_i);  where A_i < 0 and dual_clip: max(surrogate_t, dual_clip * A_i)
        loss = - sum_t scale_t * w_i * surrogate_t

    Attributes:
        sequence_ids: [C] int64 in [0, B).
        old_logp: [C] fp32.
        scale: [C] fp32, the reduction's weight of a token (and its importance weight).
        advantages, rewards, thresholds: [B] fp32; a threshold is the reward mean of the sequence's group.
        positive_weight: 0-dim fp32 tensor on the device.
        negative_weight: number.
        clip_low, clip_high: numbers >= 0.
        dual_clip: number > 1, or None.
        valid: [C] bool, the tokens that count: the others add to no sum and get a zero coefficient. None: all.
    """

    sequence_ids: Tensor
    old_logp: Tensor
    scale: Tensor
    advantages: Tensor
    rewards: Tensor
    thresholds: Tensor
    positive_weight: Tensor
    negative_weight: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    valid: Tensor | None = None


class Coefficients(NamedTuple):
    """What the loss wants from a chunk: cotangents of its statistics, and sums [len(SUMS)] fp32."""

    cotangents: LogitCotangents
    sums: Tensor


class Chunk(Protocol):
    """One token chunk of the one-pass schedule, between its first and its second matrix product."""

    def statistics(self) -> RowStatistics:
        """Statistics of the chunk's rows."""
        ...

    def gradient(self, cotangents: LogitCotangents) -> ChunkGradient:
        """Turn the chunk's workspace into its logit gradient. May be called once."""
        ...


class OpenChunk(Protocol):
    """Project a chunk of rows and reduce it to statistics; ``entropy_gradient``: its cotangent for entropy will not be None.

    ``logp_guess``: [C] fp32, about the log-prob of each target (an older policy's), or None. Never changes what is computed, whatever
    is in it; a good one may spare the backend a pass.
    """

    def __call__(
        self,
        projection: Projection,
        targets: Tensor,
        *,
        entropy: bool,
        entropy_gradient: bool,
        logp_guess: Tensor | None = None,
    ) -> Chunk: ...


@dataclass(frozen=True)
class Backend:
    """A way to compute the op.

    Attributes:
        name: what the caller passes as ``backend=``.
        supports: why these inputs cannot be run here, or None when they can.
        statistics: the forward pass.
        logit_gradient: the recomputing backward pass, one slab of the vocabulary.
        slab_bytes: bytes of workspace per logit of a slab that ``logit_gradient`` fills.
        open_chunk: the first half of the one-pass schedule for a chunk of rows.
        chunk_row_bytes: bytes of workspace per row of a chunk, with or without ``entropy_gradient``.
        add_target_rows: adds rows to ``out`` [V', D] fp32, which begins with the row of target ``first``; targets outside it
            are left alone. None: its chunks' matrices are whole.
        surrogate: statistics, coefficients and sums of a clipped surrogate of one of its chunks in one launch; None: it has no
            such kernel, and the caller does the vector maths.
    """

    name: str
    supports: Callable[[Projection], str | None]
    statistics: Statistics
    logit_gradient: LogitGradient
    slab_bytes: Callable[[Projection], int]
    open_chunk: OpenChunk
    chunk_row_bytes: Callable[[Projection, bool], int]
    add_target_rows: Callable[[Tensor, int, TargetRows], None] | None = None
    surrogate: Callable[[Any, SurrogateTerms], Coefficients] | None = None
