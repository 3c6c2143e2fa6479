"""Statistics of tokens over a support: few columns of each row instead of all V (docs/sparse.md, E15).

Logits, sums and gradients exist for the E entries of the support alone: 6ED operations forward and
backward instead of 6NVD, and nothing of size [N, V]. The backend computes products and sums of rows
(``logits_at``, ``add_rows``); the rest is arithmetic on vectors [E].

In this file: the statistics, their gradient as entries, the chunk of the one-pass schedule, the
custom op with its autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..support import TokenSupport
from ..types import IGNORE_INDEX, TokenStats
from . import dispatch, statistics_op, torch_backend
from .chunking import cdiv
from .dispatch import Backend, Entries, LogitCotangents, LogitGradient, RowStatistics, SurrogateTerms
from .gradients import GradientSum
from .lm_head import Projection, check_values
from .vocab_shard import INVALID


class SupportLogits(NamedTuple):
    """The logits of a support."""

    rows: Tensor  # [E] int64, ascending
    ids: Tensor  # [E] int64, columns of this rank's weight, or INVALID
    is_target: Tensor  # [E] bool
    z: Tensor  # [E] statistics dtype; -inf where the column is another rank's


def support_logits(
    projection: Projection, targets: Tensor, support: TokenSupport, backend: Backend | None = None, z: Tensor | None = None
) -> SupportLogits:
    """The logits (E1) of all entries, or the places of known ones, ``z``.

    targets: [N] columns of this rank's weight, ELSEWHERE or INVALID.
    """
    rows, ids, shard = support.rows(), support.ids, projection.shard
    if shard is not None:
        ids = ids - shard.start
        ids = torch.where((ids >= 0) & (ids < projection.vocab), ids, INVALID)
    if z is None:
        assert backend is not None
        z = projection.transform_logits_(backend.logits_at(projection, rows, ids), ids.clamp(0, projection.vocab - 1), rows)
        if shard is not None:
            z.masked_fill_(ids == INVALID, -torch.inf)
    return SupportLogits(rows, ids, (ids == targets[rows]) & (ids >= 0), z)


def support_statistics(
    projection: Projection, targets: Tensor, offsets: Tensor, logits: SupportLogits, *, entropy: bool, second_moments: bool
) -> RowStatistics:
    """Statistics [N] over the support alone. A row without its target is NaN.

    targets: as in ``support_logits``. offsets: of the support. One all-gather on a split head.
    """
    rows, _, is_target, z = logits

    def segments(values: list[Tensor], how: str) -> list[Tensor]:
        """Sum or maximum [N] of each [E]."""
        columns, initial = torch.stack(values, 1), 0.0 if how == "sum" else -torch.inf
        return list(torch.segment_reduce(columns, how, offsets=offsets, axis=0, initial=initial, unsafe=True).unbind(1))

    (row_max,) = segments([z], "max")
    x = (z - row_max.clamp_min(torch.finfo(z.dtype).min)[rows]).clamp_min(torch_backend.UNDERFLOWN)
    e = torch.where(is_target, 0.0, x.exp())
    terms = [torch.where(is_target, z, 0.0), is_target.to(z.dtype), e]
    if entropy or second_moments:
        terms.append(x * e)
    if second_moments:
        terms += [e * e, x * e * e, x * x * e]
    z_target, count, *sums = segments(terms, "sum")
    z_target.masked_fill_((targets >= 0) & (count == 0), torch.nan)
    return torch_backend.finish(torch_backend.row_sums(torch.stack([row_max, z_target, *sums]), targets, projection.shard))


def row_bytes(support: TokenSupport) -> int:
    """Bytes for each row of a chunk: some eight numbers an entry."""
    return cdiv(32 * support.ids.numel(), max(support.n_rows, 1))


class SupportChunk:
    """See ``Chunk``: its logits are those of a support, and its gradient has entries only."""

    def __init__(
        self, projection: Projection, targets: Tensor, valid: Tensor, support: TokenSupport, backend: Backend, *, entropy: bool
    ) -> None:
        """targets: as in ``support_logits``. valid: [C] bool, the rows that count."""
        self._projection, self._logits = projection, support_logits(projection, targets, support, backend)
        found = support_statistics(
            projection, targets, support.offsets, self._logits, entropy=entropy, second_moments=False
        )  # fmt: skip
        self._statistics = found.map(lambda values: torch.where(valid, values, 0))

    def statistics(self) -> RowStatistics:
        return self._statistics

    def surrogate(self, terms: SurrogateTerms) -> None:
        """None: there is no fused launch."""

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        entries = support_gradient(self._projection, self._logits, self._statistics, cotangents)
        return LogitGradient(None, None, entries)


def support_gradient(
    projection: Projection, logits: SupportLogits, statistics: RowStatistics, cotangents: LogitCotangents
) -> Entries:
    """dL/d(hidden @ weight.T + bias) of the entries (E6), exactly zero where a row's cotangents are."""
    rows, ids, is_target, z = logits
    coefficients = torch_backend.row_coefficients(statistics, cotangents, projection)
    alpha, beta, target = (None if c is None else c[rows] for c in coefficients)
    assert alpha is not None
    assert target is not None
    x = z - statistics.row_offset[rows]
    p = (x - statistics.log_sum[rows]).exp()
    gradient = p * alpha if beta is None else torch.where(p > 0, p * (alpha - beta * x), 0.0)
    gradient = torch.where(is_target, target, gradient)
    if projection.softcap is not None:
        gradient *= projection.softcap_slope(z, rows)
    return Entries(rows, ids, torch.where(cotangents.nonzero()[rows], gradient, 0.0))


@torch.library.custom_op("eapo_kernels::support_stats", mutates_args=())
def _forward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ids: Tensor, offsets: Tensor,
    row_inv_temperature: Tensor | None, inv_temperature: float, logit_scale: float, softcap: float | None, group: str,
    shard: Sequence[int], backend: str, debug: bool, entropy: bool, second_moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, entropy, lse [N], moments, state [3, N], and the logits z [E]. What is not asked for is empty."""
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    support, valid = TokenSupport(ids, offsets), targets != IGNORE_INDEX
    check_values(projection, targets, debug, support)
    local = projection.local_targets(targets, valid)
    logits = support_logits(projection, local, support, dispatch.resolved(backend, projection))
    s = support_statistics(projection, local, offsets, logits, entropy=entropy, second_moments=second_moments)
    s = s.map(lambda values: torch.where(valid, values, 0))
    return *statistics_op.outputs(s, entropy=entropy), logits.z


@_forward_op.register_fake
def _forward_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, ids, offsets, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard,
    backend, debug, entropy, second_moments,
):  # fmt: skip
    found = statistics_op.fake_outputs(hidden, entropy=entropy, second_moments=second_moments)
    return *found, found[0].new_empty(ids.shape[0])


@torch.library.custom_op("eapo_kernels::support_stats_backward", mutates_args=())
def _backward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ids: Tensor, offsets: Tensor,
    row_inv_temperature: Tensor | None, inv_temperature: float, logit_scale: float, softcap: float | None, group: str,
    shard: Sequence[int], backend: str, logp: Tensor, state: Tensor, z: Tensor, grad_logp: Tensor | None,
    grad_entropy: Tensor | None, grad_lse: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_hidden, d_weight, d_bias); a gradient that is not needed is empty."""
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    valid = targets != IGNORE_INDEX
    local = projection.local_targets(targets, valid)
    logits = support_logits(projection, local, TokenSupport(ids, offsets), z=z)
    cotangents = LogitCotangents(grad_logp, grad_entropy, grad_lse)
    cotangents = cotangents.map(lambda c: torch.where(valid, c.to(projection.statistics_dtype), 0))
    entries = support_gradient(projection, logits, statistics_op.statistics_of(logp, state), cotangents)
    wanted, resolved = (needs[0], needs[1], needs[2]), dispatch.resolved(backend, projection)
    total = GradientSum(projection, resolved, wanted, dtype=hidden.dtype, one_chunk=True)
    total.add(LogitGradient(None, None, entries), slice(0, len(hidden)))
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in total.result())
    return d_hidden, d_weight, d_bias


statistics_op.register_gradients(_forward_op, _backward_op, operands=7, others=6, entropy=14)


def project_support_stats(
    projection: Projection, targets: Tensor, support: TokenSupport, *, entropy: bool, second_moments: bool, backend: str,
    debug: bool,
) -> TokenStats:  # fmt: skip
    """``token_stats`` over the support of a checked projection, each [N]. targets: [N] int64, -100 masks a row."""
    p = projection
    found = _forward_op(
        p.hidden, p.weight, p.bias, targets, support.ids, support.offsets, p.row_inv_temperature, *p.op_numbers(),
        backend, debug, entropy, second_moments,
    )  # fmt: skip
    return statistics_op.token_stats_of(found, entropy=entropy, second_moments=second_moments)
