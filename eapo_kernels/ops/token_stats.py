"""Log-prob, entropy and lse of every token from hidden states and the head, with autograd (E1-E6).

The forward reads each logit once (2NDV operations). If the gradient of the log-probs with respect
to all logits fits the memory budget, the forward saves it and the backward computes two products
(4NDV). Else the backward recomputes the logits (6NDV), a slab of the vocabulary at a time: a slab
of d_weight is then complete after one sum over all tokens and rounded once, without an fp32 copy of
d_weight. ``Options.gradient_tolerance`` applies to rows that were saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import EapoError, ShapeError, describe, require, require_tensor
from ..support import TokenSupport, require_support
from ..types import DEFAULT_OPTIONS, IGNORE_INDEX, Options, TokenStats
from . import chunking, collective_checks, dispatch, gemm, sparse, statistics_op
from .dispatch import Backend, Entries, LogitCotangents, LogitGradient, RowStatistics
from .gradients import Gradients, GradientSum
from .sparsify import thinned
from .vocab_shard import VocabShard

from .lm_head import (  # isort: skip
    Projection, build_projection, check_values, may_compact, resolve_compaction, scatter_rows, select_valid, valid_index,
)  # fmt: skip

ENTROPY_MODES = ("grad", "nograd", "none")


class SavedRows(NamedTuple):
    """dlogp/d(hidden @ weight.T + bias) of all M valid rows, as in ``LogitGradient``.

    Attributes:
        matrix: [M, V] operand dtype.
        scales: [1 or 2, M] statistics dtype: row_scale, and the targets' entries if the backend has them.
        rows: [M] int64, their places; empty if all rows are valid.
    """

    matrix: Tensor
    scales: Tensor
    rows: Tensor


def compute_statistics(
    projection: Projection, targets: Tensor, backend: Backend, *, entropy: bool, second_moments: bool, options: Options,
    save: bool = False,
) -> tuple[RowStatistics, SavedRows | None]:  # fmt: skip
    """Statistics of every row, zeros where the target is -100; and the rows saved for the backward.

    save: save the rows if the plan is "one_chunk" (``chunking.autograd``); not with second moments.
    """
    n_rows, valid = projection.n_rows, targets != IGNORE_INDEX
    projection, index = select_valid(projection, valid, options.compact)
    if index is not None:
        targets, valid = targets[index], valid[index]
    if projection.n_rows == 0:
        zeros = projection.hidden.new_zeros(n_rows, dtype=projection.statistics_dtype)
        moment, mean = zeros if second_moments else None, zeros if entropy else None
        return RowStatistics(zeros, mean, zeros, zeros, zeros, mean, moment, moment, moment), None
    targets = projection.local_targets(targets, valid)
    budget, saved = chunking.workspace_bytes(options, targets.device), None
    if save:
        row_bytes = backend.chunk_row_bytes(projection, False)
        save = chunking.autograd(projection.n_rows, row_bytes, budget, options.plan).rows > 0
    if save:
        chunk = backend.open_chunk(projection, targets, entropy=entropy, entropy_gradient=False)
        statistics = chunk.statistics()
        matrix, row_scale, entries = chunk.gradient(LogitCotangents(torch.ones_like(statistics.logp)))
        assert matrix is not None
        assert row_scale is not None
        scales = torch.stack([row_scale] if entries is None else [row_scale, entries.values])
        saved = SavedRows(matrix, scales, targets.new_empty(0) if index is None else index)
    else:
        statistics = backend.statistics(projection, targets, entropy=entropy, second_moments=second_moments, budget=budget)
    return statistics.map(lambda values: scatter_rows(torch.where(valid, values, 0), index, n_rows)), saved


def gradients_of_saved(
    projection: Projection, targets: Tensor, saved: SavedRows, grad_logp: Tensor, backend: Backend,
    needs: tuple[bool, bool, bool], options: Options,
) -> Gradients:  # fmt: skip
    """The gradients from the rows that the forward saved and the cotangent of logp [N]."""
    index = saved.rows if saved.rows.numel() else None
    valid = targets != IGNORE_INDEX
    if index is None and not may_compact(targets, options.compact):
        projection = projection.zero_invalid_rows(valid)
    rows = slice(0, projection.n_rows) if index is None else index
    grad = torch.where(valid, grad_logp.to(projection.statistics_dtype), 0)[rows]
    row_scale, *target_grads = grad * saved.scales
    targets = projection.local_targets(targets, valid)[rows]
    gradient = LogitGradient(saved.matrix, row_scale, Entries.one_a_row(targets, *target_grads) if target_grads else None)
    live = valid_index(grad != 0) if may_compact(grad, options.compact) else None
    if options.gradient_tolerance is not None:
        gradient, live = thinned(projection, gradient, targets, live, options.gradient_tolerance)
    total = GradientSum(projection, backend, needs, dtype=projection.hidden.dtype, one_chunk=True)
    total.add(gradient, rows, live)
    return total.result()


def gradients_by_recomputing(
    projection: Projection, targets: Tensor, statistics: RowStatistics, cotangents: LogitCotangents, backend: Backend,
    needs: tuple[bool, bool, bool], options: Options,
) -> Gradients:  # fmt: skip
    """The gradients by E6 in the inputs' dtypes.

    Where rows may be selected, those whose target is -100 or whose cotangents are all zero are left
    out of the products. On a split head d_weight and d_bias are those of this rank's rows, and
    d_hidden is summed over the ranks before it is rounded.
    """
    n_rows, dtype = projection.n_rows, projection.statistics_dtype
    live = targets != IGNORE_INDEX
    if may_compact(targets, options.compact):
        live = live & cotangents.nonzero()
    projection, index = select_valid(projection, live, options.compact)
    if index is not None:
        targets, live, statistics, cotangents = targets[index], live[index], statistics.rows(index), cotangents.rows(index)
    cotangents = cotangents.map(lambda c: torch.where(live, c.to(dtype), 0))
    targets = projection.local_targets(targets, live)

    hidden, weight, count, vocab = projection.hidden, projection.weight, projection.n_rows, projection.vocab
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None
    d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = weight.new_zeros(vocab, dtype=dtype) if needs[2] else None
    if count > 0:
        cotangents, row_scale = cotangents.split_pow2(projection.operand_dtype)
        operand, pow2_scale = hidden, None
        if projection.operand_dtype == torch.float16 and d_weight is not None:
            operand, pow2_scale = gemm.scale_rows(hidden, row_scale, projection.operand_dtype)
        budget = chunking.workspace_bytes(options, hidden.device)
        rows, columns = chunking.slab(count, vocab, backend.slab_bytes(projection), budget)
        in_place = d_weight is not None and d_weight.dtype == dtype
        if d_weight is not None and not in_place:
            columns = min(columns, chunking.weight_slab(vocab, projection.dim))
        workspace = hidden.new_empty(rows, chunking.padded(columns), dtype=projection.operand_dtype)
        for start in range(0, vocab, columns):
            here = slice(start, min(start + columns, vocab))
            slab_weight = None
            if d_weight is not None:
                slab_weight = d_weight[here] if in_place else weight.new_zeros((here.stop - start, projection.dim), dtype=dtype)
            for first in range(0, count, rows):
                part = slice(first, min(first + rows, count))
                matrix = workspace[: part.stop - first, : here.stop - start]
                backend.logit_gradient(
                    matrix, projection.rows(part), targets[part], here, statistics.rows(part), cotangents.rows(part)
                )
                if d_hidden is not None:
                    gemm.add_product_(d_hidden[part], matrix, weight[here])
                if slab_weight is not None:
                    gemm.add_product_(slab_weight, matrix.t(), operand[part])
                if d_bias is not None and matrix.dtype == torch.float16:
                    gemm.add_weighted_rows_(d_bias[here], matrix, row_scale[part])
                elif d_bias is not None:  # row_scale is 1, and a sum needs no wider copy of the matrix
                    d_bias[here] += matrix.sum(0, dtype=dtype)
            if slab_weight is not None and pow2_scale is not None:
                slab_weight.mul_(pow2_scale)
            if d_weight is not None and slab_weight is not None and not in_place:
                d_weight[here] = slab_weight
        if d_hidden is not None:
            d_hidden.mul_(row_scale.unsqueeze(1))
            if projection.shard is not None:
                projection.shard.all_reduce_(d_hidden)
    if d_hidden is not None:
        d_hidden = scatter_rows(d_hidden.to(hidden.dtype), index, n_rows)
    return d_hidden, d_weight, None if d_bias is None else d_bias.to(weight.dtype)


@torch.library.custom_op("eapo_kernels::token_stats", mutates_args=())
def _forward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_inv_temperature: Tensor | None,
    inv_temperature: float, logit_scale: float, softcap: float | None, group: str, shard: Sequence[int], backend: str,
    memory_budget: int | None, compact: bool, plan: str, tolerance: float | None, debug: bool, entropy: bool,
    second_moments: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, entropy, lse [N], moments, state [3, N], and the three fields of ``SavedRows``.

    group, shard: the fields of a ``VocabShard``; empty if the weight is not split.
    A result that is not asked for is empty.
    """
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    check_values(projection, targets, debug)
    s, saved = compute_statistics(
        projection, targets, dispatch.resolved(backend, projection), entropy=entropy, second_moments=second_moments,
        options=Options(memory_budget, compact, debug, plan), save=save,
    )  # fmt: skip
    saved = saved or SavedRows(hidden.new_empty(0, 0), s.logp.new_empty(2, 0), targets.new_empty(0))
    return *statistics_op.outputs(s, entropy=entropy), *saved


@_forward_op.register_fake
def _forward_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard, backend,
    memory_budget, compact, plan, tolerance, debug, entropy, second_moments, save,
):  # fmt: skip
    n, rows, scales = hidden.shape[0], 0, 2
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    if save:  # else the backend is not asked, so that a symbolic N can be traced
        used = dispatch.resolved(backend, projection)
        row_bytes = used.chunk_row_bytes(projection, False)
        budget = chunking.workspace_bytes(Options(memory_budget, compact, debug, plan), hidden.device)
        rows = chunking.autograd(n, row_bytes, budget, plan).rows  # without a mask
        # Chunks that store logits have the targets' entries among them.
        if rows and (used.name == "torch" or softcap is not None or hidden.dtype == torch.float32):
            scales = 1
    found = statistics_op.fake_outputs(hidden, entropy=entropy, second_moments=second_moments)
    matrix = hidden.new_empty(rows, weight.shape[0] if rows else 0, dtype=projection.operand_dtype)
    return *found, matrix, found[0].new_empty(scales, rows), targets.new_empty(0)


@torch.library.custom_op("eapo_kernels::token_stats_backward", mutates_args=())
def _backward_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_inv_temperature: Tensor | None,
    inv_temperature: float, logit_scale: float, softcap: float | None, group: str, shard: Sequence[int], backend: str,
    memory_budget: int | None, compact: bool, plan: str, tolerance: float | None, logp: Tensor, state: Tensor,
    matrix: Tensor, scales: Tensor, index: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None,
    grad_lse: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_hidden, d_weight, d_bias); a gradient that is not needed is empty."""
    projection = Projection.of(hidden, weight, bias, row_inv_temperature, inv_temperature, logit_scale, softcap, group, shard)
    resolved, options = dispatch.resolved(backend, projection), Options(memory_budget, compact, False, plan, tolerance)
    wanted = (needs[0], needs[1], needs[2])
    if scales.numel() and grad_entropy is None and grad_lse is None and grad_logp is not None:
        saved = SavedRows(matrix, scales, index)
        gradients = gradients_of_saved(projection, targets, saved, grad_logp, resolved, wanted, options)
    else:
        statistics = statistics_op.statistics_of(logp, state)
        cotangents = LogitCotangents(grad_logp, grad_entropy, grad_lse)
        gradients = gradients_by_recomputing(projection, targets, statistics, cotangents, resolved, wanted, options)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


statistics_op.register_gradients(_forward_op, _backward_op, operands=5, others=10, entropy=16)


def project_stats(
    projection: Projection, targets: Tensor, *, entropy: str, backend: str, options: Options, second_moments: bool = False,
    support: TokenSupport | None = None,
) -> TokenStats:  # fmt: skip
    """``token_stats`` of a checked projection, [N] each. targets: -100 masks a row. backend: resolved, or "auto" in a trace."""
    p = projection
    if support is not None:
        own = entropy != "none" and not support.full_entropy
        stats = sparse.project_support_stats(
            p, targets, support, entropy=own, second_moments=second_moments, backend=backend, debug=options.debug
        )
        if entropy != "none" and support.full_entropy:
            whole = project_stats(p, targets, entropy=entropy, backend=backend, options=options)
            stats = stats._replace(entropy=whole.entropy)
    else:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (p.hidden, p.weight, p.bias))
        save = wanted and entropy != "grad" and not second_moments and not torch.compiler.is_compiling()
        assert isinstance(options.compact, bool)
        found = _forward_op(
            p.hidden, p.weight, p.bias, targets, p.row_inv_temperature, *p.op_numbers(),
            backend, options.memory_budget, options.compact, options.plan, options.gradient_tolerance, options.debug,
            entropy != "none", second_moments, save,
        )  # fmt: skip
        stats = statistics_op.token_stats_of(found, entropy=entropy != "none", second_moments=second_moments)
    if entropy == "nograd" and stats.entropy is not None:
        stats = stats._replace(entropy=stats.entropy.detach())
    return stats


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    mask: Tensor | None = None,
    entropy: str = "grad",
    second_moments: bool = False,
    support: TokenSupport | None = None,
    process_group: dist.ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
    options: Options | None = None,
) -> TokenStats:
    """Log-prob, entropy and lse of every token, without storing all logits (docs/math.md E1-E6).

    Args:
        hidden: [..., D] bf16/fp16/fp32 (fp64 on the torch backend), hidden states at the positions
            that predict ``targets``.
        weight: [V, D], the head's weight, dtype and device of ``hidden``.
        targets: [...] int64, the sampled token at each position (already shifted); -100 masks a
            row.
        bias: [V] or None. -inf removes a column, except under a soft-cap, which maps it to
            -softcap.
        inv_temperature: 1 / temperature > 0, a number or a tensor [...].
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: factor on the logits before the soft-cap, or None.
        mask: [...] bool or None, False masks a row.
        entropy: "grad" (differentiable), "nograd" (value only) or "none" (``stats.entropy`` is
            None).
        second_moments: also return sum p^2, sum p^2 log p and the varentropy.
        support: the tokens that a sampler could have drawn, one row of them for each of the N
            positions (flattened); all statistics are then over these alone (docs/sparse.md), and no
            other logit is computed. None: the whole vocabulary.
        process_group: None, or for a head whose rows (of ``weight`` and ``bias``) are split over
            ranks: the group or this rank's ``VocabShard``. ``weight`` is then this rank's part, in
            the order of the ranks, and ``targets`` are tokens of the full vocabulary. Every rank
            makes the same call and computes the same loss from it. Results and d_hidden are the
            same bits on all ranks (do not reduce d_hidden again); d_weight and d_bias are those of
            the part. The first call with a group and a weight adds an all-gather.
            ``Options(debug=True)`` compares the arguments of the ranks; without it a difference can
            leave ranks waiting in a collective until its time-out.
        backend: "auto", "torch", "triton" or "cuda". "auto" is torch on a CPU; on a GPU the Triton
            kernels if they are right there (docs/gpu.md: the first use checks them, once), else torch.
            Without gradients a row has the same bits in any batch on triton and cuda.
        options: memory budget, plan, compaction and checks.

    Returns:
        TokenStats of [...] fp32 tensors (fp64 for fp64 inputs). Masked rows are exact zeros with
        zero gradient.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: a value is out of range (targets, supports and tensor temperatures: on CUDA only with
            ``Options(debug=True)``, else the row of such a target is NaN), an option is unknown, or
            the weights of the ranks do not fit together.
        BackendUnavailable: the backend named cannot run these inputs.
    """
    try:
        shard = None if process_group is None else VocabShard.resolve(process_group, weight)
        options = DEFAULT_OPTIONS if options is None else options
        require(isinstance(options, Options), "options", "Options or None", options)
        require(entropy in ENTROPY_MODES, "entropy", f"one of {', '.join(ENTROPY_MODES)}", repr(entropy))
        if not isinstance(targets, Tensor):
            raise ShapeError(f"targets: expected an int64 tensor [...], got {describe(targets)}")
        options, shape = resolve_compaction(options, targets, mask is not None), targets.shape
        projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, shape, shard)
        require_tensor("targets", targets, tuple(shape), (torch.int64,), projection.hidden)
        if mask is not None:
            require_tensor("mask", mask, tuple(shape), (torch.bool,), projection.hidden)
            targets = torch.where(mask, targets, IGNORE_INDEX)
        require(options.plan != "chunks", "Options.plan", "auto, one_chunk or recompute with the autograd schedule", "'chunks'")
        targets = targets.reshape(-1)
        if support is not None:
            require_support(support, targets, "support")
        if not torch.compiler.is_compiling():  # once: forward and backward take the same backend
            backend = dispatch.resolve(backend, projection).name
    except EapoError as error:
        if process_group is not None:
            collective_checks.propagate(error, process_group, options)
        raise
    if shard is not None:
        wanted = {"backend": backend, "entropy": entropy, "second_moments": second_moments, "support": support is not None}
        collective_checks.compare(projection, targets, options, call="token_stats", **wanted)
    flat = project_stats(
        projection, targets, entropy=entropy, second_moments=second_moments, backend=backend, options=options, support=support
    )
    return TokenStats._make(None if values is None else values.reshape(shape) for values in flat)
