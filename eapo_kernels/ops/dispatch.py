"""The records that the ops and their backends exchange, and the table of backends."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import BackendUnavailable, require_choice
from . import verdicts
from .lm_head import Projection
from .vocab_shard import INVALID


class RowStatistics(NamedTuple):
    """Statistics of rows as in ``TokenStats``, [N] in the statistics dtype; None: not asked for."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor
    row_offset: Tensor  # the offset m of E3: the row's largest logit, or another number near lse
    log_sum: Tensor  # log sum e^(z - row_offset), so that p = e^(z - row_offset - log_sum)
    mean_shifted: Tensor | None = None  # E_p[z - row_offset] (xbar of E3)
    p2: Tensor | None = None
    p2_logp: Tensor | None = None
    varentropy: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        """The same record with a function applied to every tensor in it."""
        return RowStatistics._make(None if t is None else function(t) for t in self)

    def rows(self, index: slice | Tensor) -> RowStatistics:
        """The statistics of some of the rows."""
        return self.map(lambda t: t[index])

    @staticmethod
    def cat(parts: list[RowStatistics]) -> RowStatistics:
        """The statistics of the rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return RowStatistics._make(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))


class LogitCotangents(NamedTuple):
    """dL/dlogp, dL/dentropy, dL/dlse of E6, each [N] in the statistics dtype; None: zero."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> LogitCotangents:
        """The same record with a function applied to every tensor in it."""
        return LogitCotangents._make(None if t is None else function(t) for t in self)

    def rows(self, index: slice | Tensor) -> LogitCotangents:
        """The cotangents of some of the rows."""
        return self.map(lambda t: t[index])

    def nonzero(self) -> Tensor:
        """[N] bool: rows with a cotangent that is not zero."""
        return torch.stack([c != 0 for c in self if c is not None]).any(0)

    def split_pow2(self, dtype: torch.dtype) -> tuple[LogitCotangents, Tensor]:
        """(cotangents near 1, row_scale [N] of powers of two): their product is this record.

        dtype: of the logit gradient. Only fp16 needs a row_scale other than 1: a mean over tokens
        makes the cotangents too small for it.
        """
        given = [c for c in self if c is not None]
        if dtype != torch.float16:
            return self, torch.ones_like(given[0])
        largest = torch.stack([c.abs() for c in given]).amax(0)
        scale = torch.where(largest > 0, torch.exp2(largest.log2().floor()), 1.0)
        return self.map(lambda c: c / scale), scale


class Entries(NamedTuple):
    """Some entries of dL/d(hidden @ weight.T + bias) of R rows."""

    rows: Tensor  # [E] int64 in [0, R), ascending
    ids: Tensor  # [E] int64, columns; INVALID ones are skipped
    values: Tensor  # [E] statistics dtype
    distinct: bool = False  # every row has one entry

    @staticmethod
    def one_a_row(ids: Tensor, values: Tensor) -> Entries:
        """The entry of column ids[i] in row i, [R]."""
        return Entries(torch.arange(ids.shape[0], device=ids.device), ids, values, True)

    def by_row(self, source: Tensor) -> WeightedRows:
        """values times the rows of source [V, D] that belong to the columns, to be added to the rows."""
        return WeightedRows(self.rows, self.ids, self.values, source, self.distinct)

    def by_column(self, source: Tensor) -> WeightedRows:
        """values times the rows of source [R, D], to be added to the columns."""
        return WeightedRows.sort(self.ids, None if self.distinct else self.rows, self.values, source)


class LogitGradient(NamedTuple):
    """dL/d(hidden @ weight.T + bias) of R rows: ``row_scale[:, None] * matrix`` plus ``entries``.

    The matrix holds the first C of them; the others have entries only. Entries where the matrix is
    zero are not rounded to its dtype: those at the targets, a row's largest.
    """

    matrix: Tensor | None  # [C, V] operand dtype
    row_scale: Tensor | None  # [C] statistics dtype
    entries: Entries | None = None

    def scaled(self, factor: Tensor) -> LogitGradient:
        """``factor`` (0-dim) times this gradient."""
        entries = None if self.entries is None else self.entries._replace(values=self.entries.values * factor)
        return LogitGradient(self.matrix, None if self.row_scale is None else self.row_scale * factor, entries)


class WeightedRows(NamedTuple):
    """Entries ``values[e] * source[rows[e]]`` to add to the rows ``keys[e]`` of an output."""

    keys: Tensor  # [E] int64, sorted; those outside of the output are skipped
    rows: Tensor  # [E] int64, row of source; INVALID ones are skipped
    values: Tensor  # [E] statistics dtype; with zero the row of source is not read
    source: Tensor  # [M, D]
    distinct: bool = False  # no key has two entries

    @staticmethod
    def sort(keys: Tensor, rows: Tensor | None, values: Tensor, source: Tensor) -> WeightedRows:
        """Sort entries by key (stable); those of value zero become INVALID. rows: None: 0, 1, 2, ...

        Masked rows all have the same target, which would be one key with many entries.
        """
        keys, order = keys.masked_fill(values == 0, INVALID).sort(stable=True)
        return WeightedRows(keys, order if rows is None else rows.gather(0, order), values.gather(0, order), source)


class SurrogateTerms(NamedTuple):
    """A clipped, sign-weighted policy surrogate (E9, E10) for one fused launch.

    With i the sequence of token t, w_i = ``positive_weight`` where rewards_i > thresholds_i and
    ``negative_weight`` elsewhere, and rho = exp(clamp(logp - old_logp, -60, 60)):

        surrogate_t = min(rho * A_i, clamp(rho, 1 - clip_low, 1 + clip_high) * A_i)
        surrogate_t = max(surrogate_t, dual_clip * A_i) where A_i < 0, with dual_clip
        loss = - sum_t scale_t * w_i * surrogate_t
    """

    sequence_ids: Tensor  # [C] int64 in [0, B)
    old_logp: Tensor  # [C] fp32
    scale: Tensor  # [C] fp32, the reduction's weight of a token times its importance weight
    advantages: Tensor  # [B] fp32, A_i
    rewards: Tensor  # [B] fp32, less the mean reward of a sequence's group
    thresholds: Tensor  # [B] fp32, a deviation up to which it is a tie
    positive_weight: Tensor  # 0-dim fp32, on the device
    negative_weight: float
    clip_low: float  # >= 0
    clip_high: float  # >= 0
    dual_clip: float | None  # > 1, or None
    valid: Tensor | None = None  # [C] bool; other tokens have coefficient zero and are in no sum. None: all valid


class Coefficients(NamedTuple):
    """The loss of a chunk: cotangents of its statistics, and sums [len(SUMS)] fp32."""

    cotangents: LogitCotangents
    sums: Tensor


class Chunk(Protocol):
    """One chunk of rows between its first and its second matrix product."""

    def statistics(self) -> RowStatistics:
        """Statistics of the chunk's rows."""

    def surrogate(self, terms: SurrogateTerms) -> Coefficients | None:
        """Statistics and surrogate in one launch; None if the backend has no such kernel."""

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        """The logit gradient, in the chunk's own workspace. At most one call."""


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops.

    Attributes:
        statistics: (projection, targets, entropy=, second_moments=, budget=) -> RowStatistics.
            Reads each logit once and stores at most ``budget`` bytes of logits.
        logit_gradient: (out, projection, targets, columns, statistics, cotangents). Recomputes a
            slab of logits and writes dL/d(hidden @ weight.T + bias) (E6) to ``out`` [N, columns] in
            the operand dtype.
        open_chunk: (projection, targets, entropy=, entropy_gradient=, logp_guess=) -> Chunk. The
            first product of a chunk of rows and its sums. entropy_gradient: the entropy will have a
            cotangent. logp_guess: [C] fp32, an estimate of each log-prob (an older policy's), or
            None; a good one may save a pass, and the result is the same for any value.
        add_rows: (out, first, entries). Adds ``WeightedRows`` to ``out`` [S, D] fp32, the rows of
            keys ``first`` and above; other keys are skipped.
        logits_at: (projection, rows, ids) -> [E] fp32, hidden[rows[e]] . weight[ids[e]] without
            bias, scale, soft-cap and temperature. rows: [E] int64, ascending. ids: [E] int64; one
            outside of [0, V) gives NaN.
    """

    name: str  # the caller's ``backend=``
    supports: Callable[[Projection], str | None]  # the reason why these inputs cannot run here, or None
    statistics: Callable[..., RowStatistics]
    logit_gradient: Callable[[Tensor, Projection, Tensor, slice, RowStatistics, LogitCotangents], None]
    slab_bytes: Callable[[Projection], int]  # bytes of workspace per logit of a slab of ``logit_gradient``
    open_chunk: Callable[..., Chunk]
    chunk_row_bytes: Callable[[Projection, bool], int]  # (projection, entropy_gradient) -> workspace bytes per row of a chunk
    add_rows: Callable[[Tensor, int, WeightedRows], None]
    logits_at: Callable[[Projection, Tensor, Tensor], Tensor]


_MODULES = MappingProxyType({
    "cuda": (".cuda.backend", "triton and the packages of eapo-kernels[cuda]"),
    "triton": (".triton.backend", "triton (eapo-kernels[triton])"),
    "torch": (".torch_backend", "torch"),
})  # fmt: skip
"""name -> (module with a ``BACKEND``, imported at first use; the packages it imports)."""

NAMES = ("auto", *_MODULES)

VARIABLE = "EAPO_KERNELS_BACKEND"
"""The environment variable that says what "auto" is: a backend's name pins it, without a check."""


@functools.cache
def _module(name: str) -> Any:
    """The module of a backend, or why a package that it imports is missing: Python would try a failed import again."""
    module, needs = _MODULES[name]
    try:
        return importlib.import_module(module, __package__)
    except ImportError as error:
        return f"backend {name!r}: it needs {needs}: {error}"


def load(name: str) -> Backend:
    """Import a backend; raises BackendUnavailable if a package that it imports is missing."""
    if isinstance(module := _module(name), str):
        raise BackendUnavailable(module)
    return module.BACKEND


def resolve(name: str, projection: Projection) -> Backend:
    """The backend for these inputs. "auto": the one that ``EAPO_KERNELS_BACKEND`` names, else on a
    GPU the kernels that have shown there that they are right (``verdicts``), else torch.

    Raises EapoError if the name is unknown, and BackendUnavailable if a backend asked for by name
    cannot run these inputs.
    """
    asked, name = ("backend", name) if name != "auto" else (VARIABLE, os.environ.get(VARIABLE, "auto"))
    require_choice(asked, name, NAMES)
    if name == "auto":
        return load(_choose(projection))
    backend = load(name)
    if (reason := backend.supports(projection)) is not None:
        raise BackendUnavailable(f"{asked} {name!r}: {reason}")
    return backend


def resolved(name: str, projection: Projection) -> Backend:
    """The backend of a call of an op: "auto" only in compiled code, else already resolved."""
    return resolve(name, projection) if name == "auto" else load(name)


def on_gpu(tensor: Tensor) -> bool:
    """Whether "auto" looks for kernels."""
    return tensor.is_cuda


def _choose(projection: Projection) -> str:
    """The name of the backend that "auto" takes."""
    if not on_gpu(projection.hidden):
        return "torch"
    for name in dict.fromkeys((verdicts.fastest(projection.hidden.device), "triton")):
        if (
            not isinstance(_module(name), str)
            and load(name).supports(projection) is None
            and verdicts.is_right(name, projection)
        ):
            return name
    return "torch"


def available_backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Backend name -> None if it can run on the device, else the reason why it cannot."""
    probe = torch.empty(1, 8, device=device, dtype=torch.bfloat16)  # supported by every backend
    answer: dict[str, str | None] = {}
    for name in _MODULES:
        try:
            answer[name] = load(name).supports(Projection(probe, probe))
        except BackendUnavailable as error:
            answer[name] = str(error)
    return answer
