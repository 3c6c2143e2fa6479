"""Rows of a logit gradient as few entries, with a certificate (``Options.gradient_tolerance``).

Row i of the gradient of log-probs is s_i (E_v for v != y, -R_i at the target y) with E >= 0 and R_i the
sum of the others, so that its L1 norm is 2 |s_i| R_i. A sparse row keeps the target, exactly, and the
columns with E_v >= theta_i. Its dropped mass d_i, the sum of the other E_v, is measured, and

    d_i <= 2 tol max(R_i, F / |s_i|),  F = the chunk's mean of |s| R / 64                        (S1)

holds for every sparse row: the error of its gradient, |s_i| d_i in the L1 norm, is at most tol times the
row's own norm, or times a 64th of the mean norm. A row for which it does not hold stays dense (exact),
and so does a row that would keep more entries than its part of two dense products is worth.

theta_i comes from the maxima and sums of groups of columns: reading them instead of all logits makes the
search cheap, and a poor theta_i costs time, not accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import cdiv
from .dispatch import Entries, LogitCotangents, LogitGradient
from .lm_head import Projection, fill_holes_, may_compact

_FLOOR = 1 / 64
_ROUNDING = 2.0**-18
"""Share of a row's sum that is added to its dropped mass: more than the rounding of 64 terms in fp32."""

_GROUP, _LEAST_GROUPS = 64, 768  # columns of a group; groups of a small vocabulary, whose groups are smaller
_STEPS = 8  # of the bisection of log2(theta), which is known within a factor V before
_AIM = 0.9  # share of the bound that theta is chosen for
_LOOKED_AT = 32  # rows that decide whether the others are worth looking at
_LEAST_SPARSE = 0.15
"""Share of rows that must be sparse: below it the search costs more than it saves (docs/log.md)."""

_BLOCK_BYTES = (4 * 2**20, 128 * 2**20)
"""Bytes of the rows that are processed together, on a CPU and elsewhere: in its cache; so that masks stay small."""

_MOST_KEPT = (1 / 32, 1 / 256)
"""Share of the columns that a sparse row keeps at most. Entries cost as much as the row's part of two dense
products at about a 15th on a CPU (measured, D = 576) and a 128th on CUDA (predicted from memory rates)."""


class Sparsity(NamedTuple):
    """What became of the rows of a gradient that are not zero, 0-dim statistics dtype."""

    dropped_mass_max: Tensor  # d_i as a share of max(R_i, F / |s_i|) of S1: at most 2 tol
    dropped_mass_mean: Tensor  # over all rows; 0 in dense ones
    kept_per_row: Tensor  # mean over the sparse rows, the target's included
    dense_share: Tensor  # of the rows

    def metrics(self) -> dict[str, Tensor]:
        """By name, 0-dim fp32."""
        return {f"sparse/{name}": value.float() for name, value in self._asdict().items()}

    @staticmethod
    def of(tallies: list[Tensor]) -> Sparsity:
        """From the tallies of ``sparsify`` for all chunks; without any row: zeros, and all dense."""
        tally = torch.stack(tallies)
        dropped, kept, n_sparse, n_rows = tally[:, 1:].sum(0)
        n_rows = n_rows.clamp_min(1)
        return Sparsity(tally[:, 0].amax(), dropped / n_rows, kept / n_sparse.clamp_min(1), 1 - n_sparse / n_rows)


def applies(projection: Projection, gradient: LogitGradient, cotangents: LogitCotangents) -> bool:
    """Whether a chunk's gradient has the form of ``sparsify``, and the host may wait for counts.

    A split head has only a part of a row's columns, and its ranks would choose different rows.
    """
    own = cotangents.entropy is None and cotangents.lse is None and projection.softcap is None and projection.shard is None
    return own and gradient.matrix is not None and len(gradient.matrix) > 0 and may_compact(gradient.matrix, True)


def thinned(
    projection: Projection, gradient: LogitGradient, targets: Tensor, live: Tensor | None, tolerance: float
) -> tuple[LogitGradient, Tensor | None]:
    """A chunk's gradient of log-probs whose matrix is kept: (gradient, live) as ``GradientSum.add`` takes them,
    ``live`` being the dense rows if some are sparse."""
    assert gradient.row_scale is not None
    found = None
    if applies(projection, gradient, LogitCotangents(gradient.row_scale)):
        found, _ = select(gradient, targets, tolerance)
    return (gradient, live) if found is None else (gradient._replace(entries=found[0]), (~found[1]).nonzero().squeeze(1))


def sparsify(gradient: LogitGradient, targets: Tensor, tolerance: float) -> tuple[LogitGradient, Tensor | None, Tensor]:
    """Replace rows of a chunk's gradient of log-probs by few entries (S1), as ``select`` finds them.

    The matrix is used up: the dense rows move to its front.

    Returns (gradient with the dense rows first, [C] the places that its rows had, tally), or (the same
    gradient, None, tally) where no row is sparse.
    """
    found, tally = select(gradient, targets, tolerance)
    matrix, row_scale, own = gradient
    if found is None or matrix is None or row_scale is None:
        return gradient, None, tally
    few, sparse = found
    places = fill_holes_(matrix, ~sparse)
    order = torch.cat([places, sparse.nonzero().squeeze(1)])
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[few.rows]
    few = few._replace(rows=rows) if own is None else _sorted(rows, few.ids, few.values)
    if len(places) == 0:
        return LogitGradient(None, None, few), order, tally
    return LogitGradient(matrix[: len(places)], row_scale[places], few), order, tally


def select(gradient: LogitGradient, targets: Tensor, tolerance: float) -> tuple[tuple[Entries, Tensor] | None, Tensor]:
    """The sparse rows of a chunk's gradient of log-probs, and their entries (S1). Synchronizes on CUDA.

    Args:
        gradient: of C rows, s = ``row_scale``. The matrix has E, and at the target -R or, if there
            are entries, which are the targets' then, one a row, 0. A row of any other sign stays dense.
        targets: [C] int64 in [0, V); the row of another one stays dense.
        tolerance: tol of S1.

    Returns ((the entries, those of dense rows included; [C] bool, which rows are sparse), tally), or
    (None, tally) where too few rows would be sparse, which costs the search in 32 rows.
    tally: [5], the largest and the sum of the dropped shares, kept entries, sparse rows, C (``Sparsity``).
    """
    matrix, row_scale, entries = gradient
    assert matrix is not None
    assert row_scale is not None
    n_rows, columns = matrix.shape
    index = targets.clamp(0, columns - 1).unsqueeze(1)
    own = matrix.gather(1, index)
    at_target = row_scale * own.squeeze(1) if entries is None else entries.values
    bound = _bounds(row_scale, at_target, tolerance).masked_fill_((targets < 0) | (targets >= columns), torch.nan)
    most, nothing = int(columns * _MOST_KEPT[matrix.device.type != "cpu"]), row_scale.new_tensor([0, 0, 0, 0, n_rows])

    some = slice(None, None, max(1, n_rows // _LOOKED_AT))
    threshold, total = _thresholds(matrix[some], bound[some], most, index[some])
    if float(threshold.isnan().float().mean()) > 1 - _LEAST_SPARSE:
        return None, nothing
    threshold, total = _thresholds(matrix, bound, most, index)
    rows, ids, values = _select(matrix, threshold, index)
    is_target = ids == targets[rows]
    ends = torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))
    counts = ends.diff()
    kept = torch.segment_reduce(values.masked_fill(is_target, 0).double(), "sum", lengths=counts, unsafe=True)
    dropped = (total - kept).clamp_min(0) + total * _ROUNDING
    sparse = (dropped <= bound) & total.isfinite() & (counts <= most) & ~threshold.isnan()
    count = int(sparse.sum())
    if count == 0:
        return None, nothing
    here = sparse[rows]
    rows, ids, values, is_target = rows[here], ids[here], values[here], is_target[here]
    few = Entries(rows, ids, torch.where(is_target, at_target[rows], values * row_scale[rows]))
    shares = torch.where(sparse, dropped / bound * (2 * tolerance), 0)
    tally = torch.stack([shares.amax(), shares.sum(), *shares.new_tensor([len(rows), count, n_rows])]).to(row_scale.dtype)
    if entries is not None:
        dense = (~sparse).nonzero().squeeze(1)
        few = _sorted(
            torch.cat([dense, rows]), torch.cat([targets[dense], ids]), torch.cat([at_target[dense], few.values])
        )  # fmt: skip
    return (few, sparse), tally


def _sorted(rows: Tensor, ids: Tensor, values: Tensor) -> Entries:
    """Entries whose rows come in any order, [E] each."""
    rows, order = rows.sort(stable=True)
    return Entries(rows, ids[order], values[order])


def _bounds(row_scale: Tensor, at_target: Tensor, tolerance: float) -> Tensor:
    """[C] the right side of S1; inf where s is zero, NaN where the signs are not those of a sum E >= 0."""
    size, norm = row_scale.abs(), at_target.abs()
    floor = norm.nan_to_num(0, 0, 0).mean() * _FLOOR
    bound = torch.where(size > 0, torch.maximum(norm, floor) / size, torch.inf) * (2 * tolerance)
    return torch.where((row_scale.sign() * at_target.sign() <= 0) & norm.isfinite(), bound, torch.nan)


def _thresholds(matrix: Tensor, bound: Tensor, most: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """([C] the largest theta with which the dropped mass is at most the bound, as far as the groups tell,
    [C] fp64 the sums of the rows).

    NaN where the bound is NaN, or where more than ``most`` columns would be kept.

    The groups whose maximum is below theta are dropped whole; their sums, scaled up to all groups,
    estimate the dropped mass, and the row's sum without the other groups' maxima is never below it.
    """
    largest, sums, width = _groups(matrix, bound.dtype, index)
    n_groups, total, top = sums.shape[1], sums.sum(1), largest.sum(1)
    low, high = (bound / matrix.shape[1]).log2(), bound.log2()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = (largest < middle.exp2().unsqueeze(1)).to(sums.dtype)
        estimate = torch.linalg.vecdot(sums, below) * (n_groups / below.sum(1))  # NaN where none is below
        upper = total - (top - torch.linalg.vecdot(largest, below))
        passes = torch.fmin(estimate, upper) <= bound * _AIM
        low, high = torch.where(passes, middle, low), torch.where(passes, high, middle)
    threshold = low.exp2()
    hit = torch.count_nonzero(largest >= threshold.unsqueeze(1), 1).to(sums.dtype)
    expected = torch.minimum(-n_groups * torch.log1p(-hit / n_groups), hit * width)  # of columns thrown into groups
    return torch.where(expected <= most, threshold, torch.nan), sums.sum(1, dtype=torch.float64)


def _groups(matrix: Tensor, dtype: torch.dtype, index: Tensor) -> tuple[Tensor, Tensor, int]:
    """(maxima, sums, each [C, G] in ``dtype``, columns of a group) without the targets, columns ``index`` [C, 1].

    The columns of a group are far from each other, because neighbours in a vocabulary are alike; those
    that fill no group are groups of one.
    """
    columns = matrix.shape[1]
    width = min(_GROUP, max(1, columns // _LEAST_GROUPS))
    count = columns // width
    largest, sums = [], []
    for block in _blocks(matrix):
        part, rest = matrix[block, : width * count].unflatten(1, (width, count)), matrix[block, width * count :].to(dtype)
        largest.append(torch.cat([part.amax(1).to(dtype), rest], 1))
        sums.append(torch.cat([part.sum(1, dtype=dtype), rest], 1))
    group = torch.where(index < width * count, index % count, index - (width - 1) * count)
    own = matrix.gather(1, index).to(dtype)  # -R, whose size is that of all others
    return torch.cat(largest).clamp_min_(0), torch.cat(sums).scatter_add_(1, group, -own), width


def _select(matrix: Tensor, threshold: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, ids, values) [E] of the columns >= threshold and of the targets, row by row; none where it is NaN.

    Eight columns at a time are looked for as one word, because few are kept.
    """
    columns, found = matrix.shape[1], []
    padded = cdiv(columns, 8) * 8
    for block in _blocks(matrix):
        part, limit = matrix[block], threshold[block].unsqueeze(1)
        mask = torch.zeros(len(part), padded, dtype=torch.bool, device=part.device)
        torch.ge(part, limit, out=mask[:, :columns])
        mask.scatter_(1, index[block], ~limit.isnan())
        words = mask.view(torch.int64).view(-1).nonzero().squeeze(1)
        word, byte = mask.view(-1, 8)[words].nonzero().unbind(1)
        place = words[word] * 8 + byte
        rows = place // padded
        ids = place - rows * padded
        found.append((rows + block.start, ids, part[rows, ids].to(threshold.dtype)))
    rows, ids, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, ids, values


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that are processed together."""
    n_rows, columns = matrix.shape
    step = max(1, _BLOCK_BYTES[matrix.device.type != "cpu"] // (columns * matrix.element_size()))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
