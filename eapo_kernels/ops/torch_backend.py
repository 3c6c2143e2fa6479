"""The ``torch`` backend: plain PyTorch on chunks of rows, for any device and float dtype.

On a CPU statistics alone are computed slab by slab of the vocabulary in one buffer that stays in the
cache. If a gradient follows, one product computes all raw logits of a chunk, and the element-wise
operations process blocks of its rows.

On CUDA every pass over a chunk is a pass over its memory, so ``softmax_chunk`` needs few: statistics
and the gradient's matrix of whole rows, 14 bytes a logit where torch.compile works and 30 elsewhere,
in place. What it does not know (a split head, second moments, a gradient of the entropy or of a
soft-cap) takes the CPU's way with the whole chunk as one block.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import chunking, gemm
from .dispatch import Backend, Chunk, LogitCotangents, LogitGradient, RowStatistics, SurrogateTerms, WeightedRows
from .lm_head import Projection
from .vocab_shard import INVALID, VocabShard, merge_ranges

logger = logging.getLogger("eapo_kernels")

_CACHE_BYTES = 32 * 2**20
"""Bytes of logits in a block, about a server's last-level cache. Smaller blocks are not faster and
add thread barriers (docs/log.md)."""

UNDERFLOWN = -1e4
"""Replaces -inf in removed columns: its exp is 0, and x * e^x is 0 instead of NaN."""

_NEGLIGIBLE = 60.0
"""Upper bound (nats) of the distance of a shard's largest logit from the row's, in the row factor
of the gradient: larger factors overflow, and all probabilities of such a shard are below e^-60."""


class RowSums(NamedTuple):
    """Sums over the vocabulary without the target, [N] statistics dtype; x_v = z_v - row_max.

    ``1 - p_y`` is then the quotient ``sum_exp_excl_target / s0``, and the log-prob of a confident
    token is ``-log1p(sum_exp_excl_target)``. Both keep the precision that a difference would lose.

    Attributes:
        row_max: max_v z_v, the target included.
        x_target: z_y - row_max <= 0.
        sum_exp_excl_target: sum e^x.
        x_exp: sum x e^x, or None without entropy.
        exp2: sum e^(2x), or None.
        x_exp2: sum x e^(2x), or None.
        xx_exp: sum x^2 e^x, or None.
    """

    row_max: Tensor
    x_target: Tensor
    sum_exp_excl_target: Tensor
    x_exp: Tensor | None = None
    exp2: Tensor | None = None
    x_exp2: Tensor | None = None
    xx_exp: Tensor | None = None


def finish(sums: RowSums) -> RowStatistics:
    """E2-E4 from the sums. A row whose logits are all -inf gives NaN."""
    row_max, x, sum_exp = sums.row_max, sums.x_target, sums.sum_exp_excl_target
    e = x.exp()
    s0 = sum_exp + e
    log_s0 = s0.log()
    log_sum = torch.where(x == 0, sum_exp.log1p(), log_s0)
    logp = torch.where(x == 0, -log_sum, x - log_s0)  # both terms are <= 0: no cancellation
    entropy = mean = p2 = p2_logp = varentropy = None
    if sums.x_exp is not None:
        mean = (sums.x_exp + _x_times(x, e)) / s0
        entropy = (log_sum - mean).clamp_min(0)
    if sums.exp2 is not None and sums.x_exp2 is not None and sums.xx_exp is not None:
        assert sums.x_exp is not None
        centre = (sums.x_exp + _x_times(x, e)) / s0
        varentropy = ((sums.xx_exp + torch.where(e > 0, x * x * e, torch.zeros_like(e))) / s0 - centre * centre).clamp_min(0)
        p2 = (sums.exp2 + e * e) / (s0 * s0)
        p2_logp = (sums.x_exp2 + _x_times(x, e * e)) / (s0 * s0) - log_sum * p2
    return RowStatistics(logp, entropy, row_max + log_sum, row_max, log_sum, mean, p2, p2_logp, varentropy)


def _x_times(x: Tensor, e: Tensor) -> Tensor:
    """x * e with the limit 0 at x = -inf."""
    return torch.where(e > 0, x * e, torch.zeros_like(e))


def _blocks(z: Tensor) -> Iterator[slice]:
    """Slices of rows of z that are processed together."""
    n_rows, columns = z.shape
    step = n_rows if z.is_cuda else max(1, min(_CACHE_BYTES // (columns * z.element_size()), n_rows // 4))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _raw_logits(projection: Projection, columns: slice) -> Tensor:
    """hidden @ weight[columns].T: [N, columns] statistics dtype."""
    weight = projection.weight[columns]
    out = projection.hidden.new_empty(projection.n_rows, weight.shape[0], dtype=projection.statistics_dtype)
    return gemm.project_(out, projection.hidden, weight)


def _range_sums(z: Tensor, targets: Tensor, *, entropy: bool, second_moments: bool, all_columns: bool) -> list[Tensor]:
    """The sums of a block of logits z [R, columns]: 3, 4 or 7 fields of ``merge_ranges``, each [R].

    z is overwritten: by e^(z - row_max), 0 at the target; with second moments by scratch values.
    targets: [R] columns of z, or numbers outside. all_columns: z has all columns of all shards.
    """
    row_max = z.amax(1, keepdim=True)
    index = targets.unsqueeze(1)
    if not all_columns:
        row_max.clamp_(min=torch.finfo(z.dtype).min)  # a range may be all -inf, a row not
    inside = (index >= 0) & (index < z.shape[1])
    z_target = torch.where(inside, z.gather(1, index.clamp(0, z.shape[1] - 1)), 0.0)
    x = torch.sub(z, row_max)
    x.clamp_(min=UNDERFLOWN)
    e = torch.exp(x, out=z)
    _put_target_(e, targets, slice(0, z.shape[1]), torch.zeros_like(z_target))
    fields = [row_max.squeeze(1), z_target.squeeze(1), e.sum(1)]
    if second_moments:
        xx_exp = torch.square(x).mul_(e).sum(1)
    if entropy or second_moments:
        fields.append(x.mul_(e).sum(1))
    if second_moments:
        x_exp2 = x.mul_(e).sum(1)
        fields += [torch.mul(e, e, out=x).sum(1), x_exp2, xx_exp]
    return fields


def row_sums(fields: Tensor, targets: Tensor, shard: VocabShard | None) -> RowSums:
    """The sums over all shards from those of this one [fields, N]; NaN for an invalid target."""
    fields[1].masked_fill_(targets == INVALID, torch.nan)
    if shard is not None:
        fields = merge_ranges(shard.all_gather(fields))
    row_max, z_target, *others = fields.unbind(0)
    return RowSums(row_max, z_target - row_max, *others)


def statistics(projection: Projection, targets: Tensor, *, entropy: bool, second_moments: bool, budget: int) -> RowStatistics:
    """See ``Backend.statistics``. One all-gather for all rows of a split head."""
    if projection.hidden.is_cuda and projection.shard is None and not second_moments:
        return _statistics_of_rows(projection, targets, entropy, budget)
    if not projection.hidden.is_cuda:
        budget = min(budget, _CACHE_BYTES)
    rows, columns = chunking.slab(projection.n_rows, projection.vocab, chunk_bytes(projection), budget)
    parts = [
        _streamed(projection.rows(slice(start, start + rows)), targets[start : start + rows], columns, entropy, second_moments)
        for start in range(0, projection.n_rows, rows)
    ]
    return finish(row_sums(torch.cat(parts, 1), targets, projection.shard))


def _streamed(projection: Projection, targets: Tensor, columns: int, entropy: bool, second_moments: bool) -> Tensor:
    """[fields, N] over the columns of this shard, ``columns`` of them at a time."""
    n_rows, vocab = projection.n_rows, projection.vocab
    logits = projection.hidden.new_empty(n_rows * min(columns, vocab), dtype=projection.statistics_dtype)
    ranges = []
    for start in range(0, vocab, columns):
        slab = slice(start, min(start + columns, vocab))
        z = logits[: n_rows * (slab.stop - start)].view(n_rows, -1)
        gemm.project_(z, projection.hidden, projection.weight[slab])
        blocks = [
            _range_sums(
                projection.rows(block).transform_logits_(z[block], slab), targets[block] - start,
                entropy=entropy, second_moments=second_moments, all_columns=z.shape[1] == projection.full_vocab,
            )
            for block in _blocks(z)
        ]  # fmt: skip
        ranges.append(torch.stack([torch.cat(field) for field in zip(*blocks, strict=True)]))
    return merge_ranges(torch.stack(ranges, 1)) if len(ranges) > 1 else ranges[0]


def logit_gradient(
    out: Tensor,
    projection: Projection,
    targets: Tensor,
    columns: slice,
    statistics: RowStatistics,
    cotangents: LogitCotangents,
) -> None:
    """See ``Backend.logit_gradient``."""
    z = out if out.dtype == projection.statistics_dtype else _raw_logits(projection, columns)
    if z is out:
        gemm.project_(z, projection.hidden, projection.weight[columns])
    elif z.is_cuda and cotangents.entropy is None and projection.softcap is None:  # in place, 22 bytes a logit
        alpha, _, target = row_coefficients(statistics, cotangents, projection)
        projection.transform_logits_(z, columns).sub_((statistics.row_offset + statistics.log_sum).unsqueeze(1))
        torch.mul(z.exp_(), alpha.unsqueeze(1), out=out)
        _put_target_(out, targets, columns, target.unsqueeze(1).to(out.dtype))
        return
    for block in _blocks(z):
        part = projection.rows(block)
        logits = part.transform_logits_(z[block], columns)
        s = statistics.rows(block)
        coefficients = row_coefficients(s, cotangents.rows(block), part)
        gradient = _gradient_from_logits_(logits, part, targets[block], columns, s, coefficients)
        if z is not out:
            out[block] = gradient


def row_coefficients(s: RowStatistics, c: LogitCotangents, projection: Projection) -> tuple[Tensor, Tensor | None, Tensor]:
    """(alpha, beta, target) [R]: dL/dz_v = p_v (alpha - beta x_v) for v != y, else target (E6)."""
    zero = torch.zeros_like(s.logp)
    a = zero if c.logp is None else c.logp
    g = zero if c.lse is None else c.lse
    p_target = s.logp.exp()
    alpha, beta, target = g - a, None, a * -torch.expm1(s.logp) + g * p_target
    if c.entropy is not None:
        assert s.mean_shifted is not None
        beta = c.entropy
        alpha = alpha + beta * s.mean_shifted
        x_target = s.logp + s.log_sum
        target = target - torch.where(p_target > 0, beta * p_target * (x_target - s.mean_shifted), zero)
    scale = projection.row_scale()
    return alpha * scale, None if beta is None else beta * scale, target * scale


def _gradient_from_logits_(
    z: Tensor,
    projection: Projection,
    targets: Tensor,
    columns: slice,
    s: RowStatistics,
    coefficients: tuple[Tensor, Tensor | None, Tensor],
) -> Tensor:
    """Overwrite a block of logits z [R, columns] with the gradient of the raw logits."""
    alpha, beta, target = (None if c is None else c.unsqueeze(1) for c in coefficients)
    assert alpha is not None
    assert target is not None
    slope = projection.softcap_slope(z) if projection.softcap is not None else None
    x = z.sub_(s.row_offset.unsqueeze(1))
    p = torch.sub(x, s.log_sum.unsqueeze(1)).exp_()
    if beta is None:
        gradient = torch.mul(p, alpha, out=z)
    else:
        x.clamp_(min=UNDERFLOWN)
        gradient = x.mul_(-beta).add_(alpha).mul_(p)
    _put_target_(gradient, targets, columns, target)
    return gradient if slope is None else gradient.mul_(slope)


def _put_target_(gradient: Tensor, targets: Tensor, columns: slice, value: Tensor) -> None:
    """gradient[i, targets[i]] = value[i] for targets in the slab; value: [R, 1]."""
    local = (targets - columns.start).unsqueeze(1)
    inside = (local >= 0) & (local < gradient.shape[1])
    local = local.clamp(0, gradient.shape[1] - 1)
    gradient.scatter_(1, local, torch.where(inside, value, gradient.gather(1, local)))


class SoftmaxChunk(NamedTuple):
    """``softmax_chunk`` of C rows, vectors [C] statistics dtype. q = softmax of the logits without the target's.

    From q follow exactly p_v = (1 - p_y) q_v and log p_y, however near p_y is to 0 or 1.
    """

    offset: Tensor  # the largest logit but the target's
    log_sum: Tensor  # log sum e^(z - offset)
    logp: Tensor  # NaN for an invalid target
    rest: Tensor  # 1 - p_y
    entropy: Tensor | None
    matrix: Tensor | None = None  # [C, V] operand dtype: (q, -1 at the target) times ``_SCALE`` of the dtype

    def statistics(self) -> RowStatistics:
        """The row statistics."""
        mean = None if self.entropy is None else self.log_sum - self.entropy
        return RowStatistics(self.logp, self.entropy, self.offset + self.log_sum, self.offset, self.log_sum, mean)


_SCALE = {torch.float16: 1024.0}
"""fp16 loses precision below 6e-5: near-uniform rows of a large vocabulary are there."""


def softmax_chunk(z: Tensor, targets: Tensor, dtype: torch.dtype, *, entropy: bool, matrix: bool) -> SoftmaxChunk:
    """Statistics of logits z [C, V] fp32/fp64, which are overwritten, and the gradient's matrix.

    targets: [C] int64 or INVALID. dtype: of the matrix; where it is z's, the matrix is z.
    entropy, matrix: what is wanted.
    """
    out = None
    if matrix:
        out = z if dtype == z.dtype else z.new_empty(z.shape[0], chunking.padded(z.shape[1]), dtype=dtype)[:, : z.shape[1]]
    compiled = _compiled() if z.is_cuda and _may_compile() else None
    if compiled is not None:
        try:
            vectors: Vectors = compiled(z, targets, out, _SCALE.get(dtype, 1.0), entropy)
            return SoftmaxChunk(*vectors, out)
        except Exception as error:  # of the compiler: no C compiler, an unknown GPU, a bug
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _log_plain(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            _compiled.cache_clear()
    return SoftmaxChunk(*plain_softmax(z, targets, out, _SCALE.get(dtype, 1.0), entropy), out)


Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def plain_softmax(z: Tensor, targets: Tensor, out: Tensor | None, scale: float, entropy: bool) -> Vectors:
    """The vectors of a ``SoftmaxChunk``; z is overwritten, and ``out``, if given, is filled.

    Bytes a logit: maximum 4, softmax in place 8, matrix 6 (none in fp32), entropy in place 12.
    """
    index = targets.clamp(0, z.shape[1] - 1).unsqueeze(1)
    z_target = z.gather(1, index)
    top = z.scatter_(1, index, torch.finfo(z.dtype).min).max(1, keepdim=True)  # finite: the target may be the only column
    q = torch.softmax(z, 1, out=z)
    log_others = -q.gather(1, top.indices).log()
    if out is not None and out is not z:
        torch.mul(q, scale, out=out)
    q_entropy = None
    if entropy:
        # In fp32 the matrix is z itself, so that its terms need memory of their own.
        q_entropy = torch.special.entr(q, out=z if out is not z else torch.empty_like(z)).sum(1, keepdim=True)
    if out is not None:
        out.scatter_(1, index, -scale)
    return _vectors(targets, z_target, top.values, log_others, q_entropy)


def fused_softmax(z: Tensor, targets: Tensor, out: Tensor | None, scale: float, entropy: bool) -> Vectors:
    """As ``plain_softmax`` for the compiler, which reads z three times and writes ``out``; z stays."""
    is_target = torch.arange(z.shape[1], device=z.device).unsqueeze(0) == targets.clamp(0, z.shape[1] - 1).unsqueeze(1)
    z_target = torch.where(is_target, z, 0.0).sum(1, keepdim=True)
    others = torch.where(is_target, torch.finfo(z.dtype).min, z)
    top = others.amax(1, keepdim=True)
    x = others - top
    e = x.exp()
    total = e.sum(1, keepdim=True)
    log_others = total.log()
    q_entropy = log_others - torch.where(e > 0, x * e, 0.0).sum(1, keepdim=True) / total if entropy else None
    if out is not None:  # an exponential of its own, so that e is not kept in memory
        out.copy_(torch.where(is_target, -scale, (x - log_others).exp() * scale))
    return _vectors(targets, z_target, top, log_others, q_entropy)


def _vectors(targets: Tensor, z_target: Tensor, top: Tensor, log_others: Tensor, q_entropy: Tensor | None) -> Vectors:
    """[C] each from columns [C, 1]: log_others is log sum e^(z - top) without the target, q_entropy is H(q)."""
    margin = z_target - top - log_others  # log(p_y / (1 - p_y))
    logp, log_rest = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    rest, entropy = log_rest.exp(), None
    if q_entropy is not None:
        own = torch.where(logp > -torch.inf, logp.exp() * logp, 0.0) + torch.where(rest > 0, rest * log_rest, 0.0)
        entropy = (rest * q_entropy - own).squeeze(1)
    logp = torch.where(targets == INVALID, torch.nan, logp.squeeze(1))
    return top.squeeze(1), (log_others - log_rest).squeeze(1), logp, rest.squeeze(1), entropy


def _may_compile() -> bool:
    """Not in a graph capture, nor under a dispatch mode (selective checkpointing, FLOP counters), with
    which the compiler would give the function up for good."""
    return not (torch.cuda.is_current_stream_capturing() or _get_current_dispatch_mode())


@functools.cache
def _compiled() -> Callable[..., Any] | None:
    """``fused_softmax`` as one compiled function for all N and V; None if it did not compile."""
    if _log_plain.cache_info().currsize:
        return None
    logger.info("compiling the torch backend's softmax (first use, about 10 s)")
    return torch.compile(fused_softmax, dynamic=True, fullgraph=True)


@functools.cache
def _log_plain(reason: str) -> None:
    logger.warning("the torch backend runs without torch.compile, in more passes over memory: %s", reason)


def _statistics_of_rows(projection: Projection, targets: Tensor, entropy: bool, budget: int) -> RowStatistics:
    """``statistics`` by chunks of whole rows."""
    rows = chunking.row_chunk(projection.n_rows, projection.statistics_dtype.itemsize * projection.vocab, budget)
    parts = []
    for start in range(0, projection.n_rows, rows):
        part = projection.rows(slice(start, start + rows))
        z = part.transform_logits_(_raw_logits(part, slice(0, projection.vocab)), slice(0, projection.vocab))
        chunk = softmax_chunk(z, targets[start : start + rows], z.dtype, entropy=entropy, matrix=False)
        parts.append(chunk.statistics())
        del z
    return RowStatistics.cat(parts)


class _SoftmaxChunk:
    """See ``Chunk``: on CUDA, where the gradient is that of logp alone."""

    def __init__(self, projection: Projection, targets: Tensor, entropy: bool) -> None:
        columns, self._projection = slice(0, projection.vocab), projection
        z = projection.transform_logits_(_raw_logits(projection, columns), columns)
        dtype = projection.operand_dtype
        self._scale = _SCALE.get(dtype, 1.0)
        self._chunk = softmax_chunk(z, targets, dtype, entropy=entropy, matrix=True)
        self._matrix = self._chunk.matrix

    def statistics(self) -> RowStatistics:
        return self._chunk.statistics()

    def surrogate(self, terms: SurrogateTerms) -> None:
        """None: there is no fused launch."""

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        """-(1 - p_y) of the matrix is the gradient of logp (E6)."""
        assert cotangents.logp is not None
        assert cotangents.entropy is None
        assert self._matrix is not None
        matrix, self._matrix, self._chunk = self._matrix, None, self._chunk._replace(matrix=None)
        return LogitGradient(matrix, cotangents.logp * self._chunk.rest * self._projection.row_scale() / -self._scale)


class _TorchChunk:
    """See ``Chunk``. Without ``keep_logits`` the forward's exponentials are the gradient's matrix.

    The matrix then has e^(z - m), m the row's maximum in this shard, and -sum_exp_excl_target *
    shard_scale at the target. The gradient of z is the matrix times (cotangent of logp) / -(s0 *
    shard_scale) (E6, E12), where shard_scale = e^(row_max - m).
    """

    def __init__(self, projection: Projection, targets: Tensor, entropy: bool, keep_logits: bool) -> None:
        self._projection, self._targets, self._keep_logits = projection, targets, keep_logits
        columns = slice(0, projection.vocab)
        self._z = _raw_logits(projection, columns)
        parts = []
        for block in _blocks(self._z):
            logits = projection.rows(block).transform_logits_(self._z[block], columns)
            parts.append(
                _range_sums(
                    logits.clone() if keep_logits else logits, targets[block],
                    entropy=entropy, second_moments=False, all_columns=projection.shard is None,
                )
            )  # fmt: skip
        fields = torch.stack([torch.cat(field) for field in zip(*parts, strict=True)])
        sums, row_max = row_sums(fields, targets, projection.shard), fields[0]
        self._statistics = finish(sums)
        shard_scale = (sums.row_max - row_max).clamp_(max=_NEGLIGIBLE).exp_()  # 1 without a shard
        self._s0 = (sums.sum_exp_excl_target + sums.x_target.exp()) * shard_scale
        if not keep_logits:
            _put_target_(self._z, targets, columns, (sums.sum_exp_excl_target * -shard_scale).unsqueeze(1))

    def statistics(self) -> RowStatistics:
        return self._statistics

    def surrogate(self, terms: SurrogateTerms) -> None:
        """None: there is no fused launch."""

    def gradient(self, cotangents: LogitCotangents) -> LogitGradient:
        z, self._z = self._z, self._z.new_empty(0)
        dtype = self._projection.operand_dtype
        if not self._keep_logits:
            assert cotangents.logp is not None
            assert cotangents.entropy is None
            return LogitGradient(z.to(dtype), cotangents.logp * self._projection.row_scale() / -self._s0)
        cotangents, row_scale = cotangents.split_pow2(dtype)
        columns = slice(0, self._projection.vocab)
        for block in _blocks(z):
            part, s = self._projection.rows(block), self._statistics.rows(block)
            coefficients = row_coefficients(s, cotangents.rows(block), part)
            _gradient_from_logits_(z[block], part, self._targets[block], columns, s, coefficients)
        return LogitGradient(z.to(dtype), row_scale)


def open_chunk(
    projection: Projection, targets: Tensor, *, entropy: bool, entropy_gradient: bool, logp_guess: Tensor | None = None
) -> Chunk:
    """See ``Backend.open_chunk``. ``logp_guess`` is not read, because the row's maximum is known.

    With fp16 operands logits are kept: the target's entry of the exponentials can be -V, which
    overflows.
    """
    if softmax_fits(projection, entropy_gradient):
        return _SoftmaxChunk(projection, targets, entropy)
    keep_logits = entropy_gradient or projection.softcap is not None or projection.operand_dtype == torch.float16
    return _TorchChunk(projection, targets, entropy, keep_logits)


def softmax_fits(projection: Projection, entropy_gradient: bool) -> bool:
    """Whether ``softmax_chunk`` computes the gradient of a chunk."""
    return projection.hidden.is_cuda and projection.shard is None and projection.softcap is None and not entropy_gradient


def chunk_bytes(projection: Projection) -> int:
    """Workspace per logit: the logits and two temporaries of a block.

    A block is the whole chunk on CUDA, else at most a quarter of it. With fewer than four rows it
    is one row, whose temporaries are not counted.
    """
    size = projection.statistics_dtype.itemsize
    return 3 * size + projection.operand_dtype.itemsize if projection.hidden.is_cuda else size + size // 2


def chunk_row_bytes(projection: Projection, entropy_gradient: bool) -> int:
    """Workspace per row of a chunk. ``softmax_chunk``: the logits, then the matrix beside them or in
    fp32 the terms of the entropy."""
    if softmax_fits(projection, entropy_gradient):
        size, operand = projection.statistics_dtype.itemsize, projection.operand_dtype.itemsize
        return chunking.padded(projection.vocab) * (size + operand)
    return projection.max_shard_vocab * chunk_bytes(projection)


_GATHERED_BYTES = 64 * 2**20
"""Bytes of rows that are gathered or widened at once for entries."""


def logits_at(projection: Projection, rows: Tensor, ids: Tensor) -> Tensor:
    """See ``Backend.logits_at``. On a CPU by MKL's sampled product, else gathered. Synchronizes on CUDA."""
    hidden, weight, dtype = projection.hidden, projection.weight, projection.statistics_dtype
    out = hidden.new_full(ids.shape, torch.nan, dtype=dtype)
    valid = (ids >= 0) & (ids < len(weight))
    if not bool(valid.all()):
        kept = valid.nonzero().squeeze(1)
        return out.index_copy_(0, kept, logits_at(projection, rows[kept], ids[kept]))
    sampled = not hidden.is_cuda and _has_sampled_product()
    for part in _parts(len(ids), projection.dim, dtype):
        here, columns = rows[part], ids[part]
        if not sampled:
            out[part] = (hidden[here].to(dtype) * weight[columns].to(dtype)).sum(1)
            continue
        first, last = int(here[0]), int(here[-1]) + 1
        operand, columns = _widened(weight, columns, dtype)
        starts = torch.searchsorted(here, torch.arange(first, last + 1))
        shape, zeros = (last - first, len(operand)), hidden.new_zeros(len(here), dtype=dtype)
        pattern = torch.sparse_csr_tensor(starts, columns, zeros, shape, check_invariants=False)
        out[part] = torch.sparse.sampled_addmm(pattern, hidden[first:last].to(dtype), operand.t(), beta=0.0).values()
    return out


def add_rows(out: Tensor, first: int, entries: WeightedRows) -> None:
    """See ``Backend.add_rows``. Sums of segments by embedding_bag, one segment a key. Synchronizes on CUDA."""
    keys, rows, values, source, _ = entries
    kept = ((keys >= first) & (keys < first + len(out)) & (values != 0)).nonzero().squeeze(1)
    keys, rows, values = keys[kept], rows[kept].clamp(0, len(source) - 1), values[kept].to(out.dtype)
    for part in _parts(len(keys), out.shape[1], out.dtype):
        segments, counts = keys[part].unique_consecutive(return_counts=True)
        operand, places = _widened(source, rows[part], out.dtype)
        bags = counts.cumsum(0) - counts
        sums = functional.embedding_bag(places, operand, bags, mode="sum", per_sample_weights=values[part])
        out.index_add_(0, segments - first, sums)  # each row once: the order of sums is fixed


@functools.cache
def _has_sampled_product() -> bool:
    """Whether PyTorch has MKL's sampled product. The first CSR tensor warns of its beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
    return torch.backends.mkl.is_available()


def _parts(count: int, dim: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of entries whose rows [dim] fit ``_GATHERED_BYTES``."""
    step = max(1, _GATHERED_BYTES // (dim * dtype.itemsize))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _widened(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a matrix of this dtype, numbers of its rows) with the given rows of ``matrix``: itself, or a copy of these."""
    if matrix.dtype == dtype and matrix.is_contiguous():
        return matrix, rows
    some, rows = rows.unique(return_inverse=True)
    return matrix[some].to(dtype), rows


BACKEND = Backend(
    name="torch",
    supports=lambda projection: None,
    statistics=statistics,
    logit_gradient=logit_gradient,
    slab_bytes=chunk_bytes,
    open_chunk=open_chunk,
    chunk_row_bytes=chunk_row_bytes,
    logits_at=logits_at,
    add_rows=add_rows,
)
