"""The schedule of the op: statistics in the forward, logits recomputed in the backward where they were not kept.

Forward reads each logit once (2NDV operations). Rows that the forward keeps cost the backward two products (4NDV), the others
a third one to recompute the logits (6NDV), a slab of the vocabulary at a time. So a slab of d_weight is complete after one sum
over all tokens, rounded once, and no fp32 copy of d_weight is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import valid_tokens
from ..types import Options
from . import plans, products
from .backend import Backend, LogitCotangents, TargetRows
from .budget import workspace_bytes
from .projection import Projection
from .rows import may_compact, scatter_rows, valid_index
from .statistics import RowStatistics


class Kept(NamedTuple):
    """dlogp/d(hidden @ weight.T + bias) of R rows, as in ``backend.ChunkGradient``.

    Attributes:
        matrix: [R, V] operand dtype.
        factors: [1 or 2, R] statistics dtype: the rows' factors, and the targets' entries where they are apart.
        rows: [R] int64, which rows they are; None: the first R.
    """

    matrix: Tensor
    factors: Tensor
    rows: Tensor | None = None


def compute_statistics(
    projection: Projection,
    targets: Tensor,
    backend: Backend,
    *,
    entropy: bool,
    second_moments: bool,
    options: Options,
    keep: int = 0,
) -> tuple[RowStatistics, Kept | None]:
    """Statistics of every row, exact zeros where the target is -100; and up to ``keep`` rows for the backward.

    keep: see ``plans.autograd``; not with second moments.
    """
    n_rows, valid = projection.n_rows, valid_tokens(targets, None)
    index = None
    if not may_compact(targets, options.compact):
        projection = projection.zero_invalid_rows(valid)
    elif (index := valid_index(valid)) is not None:
        projection, targets, valid = projection.rows(index), targets[index], valid[index]
    if projection.n_rows == 0:
        zeros = projection.hidden.new_zeros(n_rows, dtype=projection.statistics_dtype)
        moment = zeros if second_moments else None
        mean = zeros if entropy else None
        return RowStatistics(zeros, mean, zeros, zeros, zeros, mean, moment, moment, moment), None
    targets = projection.local_targets(torch.where(valid, targets, 0))
    first, kept, parts = min(keep, projection.n_rows), None, []
    budget = workspace_bytes(options.memory_budget, targets.device)
    if first:
        chunk = backend.open_chunk(
            projection.rows(slice(0, first)), targets[:first], entropy=entropy, entropy_gradient=False, logp_guess=None
        )
        statistics = chunk.statistics()
        parts.append(statistics)
        ones = LogitCotangents(torch.ones_like(statistics.logp))
        matrix, *factors = (t for t in chunk.gradient(ones) if t is not None)
        kept = Kept(matrix, torch.stack(factors), None if index is None else index[:first].clone())
        budget -= kept.matrix.untyped_storage().nbytes()
        del chunk, matrix
    if first < projection.n_rows:
        others = projection.rows(slice(first, None))
        parts.append(backend.statistics(others, targets[first:], entropy=entropy, second_moments=second_moments, budget=budget))
    result = parts[0] if len(parts) == 1 else _joined(*parts)
    return result.map(lambda values: scatter_rows(torch.where(valid, values, 0), index, n_rows)), kept


def _joined(a: RowStatistics, b: RowStatistics) -> RowStatistics:
    """The statistics of two blocks of rows as one."""
    return RowStatistics._make(None if x is None or y is None else torch.cat([x, y]) for x, y in zip(a, b, strict=True))


def compute_gradients(
    projection: Projection,
    targets: Tensor,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
    backend: Backend,
    *,
    needs: tuple[bool, bool, bool],
    options: Options,
    kept: Kept | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_hidden, d_weight, d_bias) by E6 in the inputs' dtypes, None where not needed.

    Rows whose target is -100 or whose cotangents are all zero do not enter the products. Where the vocabulary is split,
    d_weight and d_bias are those of this process's rows, and d_hidden is summed over the processes before it is rounded.

    kept: what ``compute_statistics`` kept of the same inputs; only the cotangent of logp may then be given.
    """
    n_rows, dtype = projection.n_rows, projection.statistics_dtype
    live = valid_tokens(targets, None)
    compact = may_compact(targets, options.compact)
    if kept is not None and kept.rows is not None and not compact:
        kept = None  # the forward compacted, this pass may not: nothing tells which rows come next
    index, live_kept = None, None if kept is None else _LiveKept(kept.matrix, kept.factors, None)
    if not compact:
        projection = projection.zero_invalid_rows(live)
    else:
        live = live & torch.stack([c != 0 for c in cotangents if c is not None]).any(0)
        if kept is None:
            index = valid_index(live)
        else:
            live_kept, index = _live_kept(kept, live)
        if index is not None:
            projection, targets, live = projection.rows(index), targets[index], live[index]
            statistics, cotangents = statistics.rows(index), cotangents.rows(index)
    cotangents = cotangents.map(lambda c: torch.where(live, c.to(dtype), 0))
    targets = projection.local_targets(torch.where(live, targets, 0))

    hidden, weight = projection.hidden, projection.weight
    need_hidden, need_weight, need_bias = needs
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None
    d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = weight.new_zeros(projection.vocab, dtype=dtype) if need_bias else None
    if projection.n_rows > 0:
        budget = workspace_bytes(options.memory_budget, hidden.device)
        _add_slab_gradients(projection, targets, statistics, cotangents, live_kept, backend, d_hidden, d_weight, d_bias, budget)
        if d_hidden is not None and projection.shard is not None:
            projection.shard.add_(d_hidden)
    if d_hidden is not None:
        d_hidden = scatter_rows(d_hidden.to(hidden.dtype), index, n_rows)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(weight.dtype)


class _LiveKept(NamedTuple):
    """``Kept`` with ``live`` [L], the places in ``matrix`` of the rows that ``factors`` [1 or 2, L] belong to; None: all."""

    matrix: Tensor
    factors: Tensor
    live: Tensor | None

    def columns(self, here: slice) -> Tensor:
        """[L, columns]; a copy where rows are left out."""
        return self.matrix[:, here] if self.live is None else self.matrix[self.live, here]


def _live_kept(kept: Kept, live: Tensor) -> tuple[_LiveKept, Tensor | None]:
    """The kept rows among the ``live`` [N], and the index [M] that puts them first and the other live rows behind.

    The index is None where all rows are live and in order already.
    """
    count = kept.factors.shape[1]
    rows = torch.arange(count, device=live.device) if kept.rows is None else kept.rows
    places = valid_index(live[rows])
    others = live.clone()
    others[rows] = False
    rest = others.nonzero().squeeze(1)
    if places is None and kept.rows is None and count + len(rest) == len(live):
        return _LiveKept(kept.matrix, kept.factors, None), None
    factors = kept.factors if places is None else kept.factors[:, places]
    return _LiveKept(kept.matrix, factors, places), torch.cat([rows if places is None else rows[places], rest])


def _add_slab_gradients(
    projection: Projection,
    targets: Tensor,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
    kept: _LiveKept | None,
    backend: Backend,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    budget: int,
) -> None:
    """The slab loop of ``compute_gradients``. d_hidden is the statistics-dtype accumulator, d_bias too, d_weight final."""
    hidden, weight = projection.hidden, projection.weight
    dtype = projection.statistics_dtype
    first = 0 if kept is None else kept.factors.shape[1]
    gain = _underflow_gain(projection.operand_dtype, cotangents) if first < projection.n_rows else None
    apart = None
    if kept is not None:
        budget -= kept.matrix.untyped_storage().nbytes()
        assert cotangents.logp is not None
        factor, *entries = cotangents.logp[:first] * kept.factors
        if entries:
            apart = TargetRows.sort(targets[:first], hidden[:first], entries[0])
        scaled, unit = products.scale_rows(hidden[:first], factor, projection.operand_dtype)
    if first < projection.n_rows:
        rows, columns = plans.slab(projection.n_rows - first, projection.vocab, backend.slab_bytes(projection), budget)
    else:
        rows, columns = 0, plans.columns_at_once(projection.vocab, projection.dim)
    direct = d_weight is not None and d_weight.dtype == dtype
    if d_weight is not None and not direct:
        columns = min(columns, plans.columns_at_once(projection.vocab, projection.dim))
    row_slices = [slice(r, min(r + rows, projection.n_rows)) for r in range(first, projection.n_rows, max(rows, 1))]
    if row_slices:
        workspace = hidden.new_empty(rows, plans.padded(columns), dtype=projection.operand_dtype)
    for start in range(0, projection.vocab, columns):
        here = slice(start, min(start + columns, projection.vocab))
        width = here.stop - here.start
        slab_weight = None
        if d_weight is not None:
            slab_weight = d_weight[here] if direct else weight.new_zeros((width, projection.dim), dtype=dtype)
        if kept is not None:
            matrix = kept.columns(here)
            if d_hidden is not None:
                products.add_product_(d_hidden[:first], matrix, weight[here])
            if slab_weight is not None:
                products.add_product_(slab_weight, matrix.t(), scaled)
                if unit is not None:
                    slab_weight.mul_(unit)
            if d_bias is not None:
                products.add_weighted_rows_(d_bias[here], matrix, factor)
            if apart is not None:
                assert backend.add_target_rows is not None
                if slab_weight is not None:
                    backend.add_target_rows(slab_weight, start, apart)
                if d_bias is not None:
                    ones = apart.factor.new_ones(first, 1)
                    backend.add_target_rows(d_bias[here].unsqueeze(1), start, apart._replace(hidden=ones))
            if slab_weight is not None and gain is not None:
                slab_weight.mul_(gain)
        for part in row_slices:
            gradient = workspace[: part.stop - part.start, :width]
            backend.logit_gradient(
                gradient,
                projection.rows(part),
                targets[part],
                here,
                statistics.rows(part),
                cotangents.rows(part),
                gain,
            )
            if d_hidden is not None:
                products.add_product_(d_hidden[part], gradient, weight[here])
            if slab_weight is not None:
                products.add_product_(slab_weight, gradient.t(), hidden[part])
            if d_bias is not None:
                slab_bias = gradient.sum(0, dtype=dtype)
                d_bias[here] += slab_bias if gain is None else slab_bias / gain
        if slab_weight is not None and gain is not None:
            slab_weight /= gain
        if slab_weight is not None and not direct:
            d_weight[here] = slab_weight  # type: ignore[index]
    if d_hidden is not None and gain is not None:
        d_hidden[first:] /= gain
    if d_hidden is not None and kept is not None:
        d_hidden[:first] *= factor.unsqueeze(1)
        if apart is not None:
            products.add_gathered_rows_(d_hidden[:first], weight, targets[:first], apart.factor)


def _underflow_gain(dtype: torch.dtype, cotangents: LogitCotangents) -> Tensor | None:
    """A power of two that brings the largest cotangent near 1, so that fp16 logit gradients do not underflow; else None."""
    if dtype != torch.float16:
        return None
    largest = torch.stack([c.abs().amax() for c in cotangents if c is not None]).amax()
    return torch.where(largest > 0, torch.exp2(-largest.log2().ceil()), torch.ones_like(largest))
