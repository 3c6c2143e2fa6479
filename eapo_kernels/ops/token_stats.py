"""THE op: log-prob, entropy and lse of every token from hidden states and the head, differentiable, without the logits.

This file is the custom op, its autograd and the public function; the work is in ``recompute``. docs/math.md E1-E6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import describe, require_tensor
from ..errors import ShapeError, require
from ..types import IGNORE_INDEX, Options, TokenStats
from . import dispatch, plans
from .backend import Backend, LogitCotangents
from .budget import of_options, workspace_bytes
from .collective_checks import Fact, propagate_errors
from .inputs import build_projection, call_signature, check_values, split_over
from .projection import Projection
from .recompute import Kept, compute_gradients, compute_statistics
from .rows import resolve_compaction
from .statistics import RowStatistics
from .vocab_parallel import VocabShard

ENTROPY_MODES = ("grad", "nograd", "none")


@torch.library.custom_op("eapo_kernels::token_stats", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_inv_temperature: Tensor | None,
    inv_temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    second_moments: bool,
    backend: str,
    memory_budget: int | None,
    compact: bool,
    debug: bool,
    plan: str,
    group: str,
    shard: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N], lse [N], moments [3, N], state [3, N], matrix [R, V], factors [1 or 2, R], rows [R]).

    group, shard: the fields of a ``VocabShard``; none: the weight is whole.
    What is not asked for has no elements. The last three are ``recompute.Kept`` of the rows that ``plan`` keeps; without
    elements ``rows`` is None.
    """
    projection = Projection(
        hidden, weight, bias, inv_temperature, row_inv_temperature, logit_scale, softcap, _shard(group, shard)
    )
    check_values(projection, targets, debug)
    resolved = dispatch.resolve(backend, projection, "autograd")
    s, kept = compute_statistics(
        projection,
        targets,
        resolved,
        entropy=entropy,
        second_moments=second_moments,
        options=Options(memory_budget, compact, debug),
        keep=_kept_rows(projection, resolved, memory_budget, plan),
    )
    none = s.logp.new_empty(0)
    moments = s.logp.new_empty(3, 0)
    if s.p2 is not None and s.p2_logp is not None and s.varentropy is not None:
        moments = torch.stack([s.p2, s.p2_logp, s.varentropy])
    mean = s.mean_shifted if s.mean_shifted is not None else torch.zeros_like(s.logp)
    state = torch.stack([s.row_max, s.log_sum, mean])
    matrix, factors, index = kept or Kept(hidden.new_empty(0, 0), none.new_empty(2, 0))
    index = targets.new_empty(0) if index is None else index
    entropies = s.entropy.clone() if entropy and s.entropy is not None else none
    return s.logp, entropies, s.lse.clone(), moments, state, matrix, factors, index


def _shard(group: str, numbers: Sequence[int]) -> VocabShard | None:
    """A VocabShard from what an op's schema can carry."""
    return VocabShard(group, *numbers) if numbers else None


def _kept_rows(projection: Projection, backend: Backend, memory_budget: int | None, plan: str) -> int:
    """Rows to keep. Nothing is asked of the backend for "recompute", so that it compiles for any, also an unknown, N."""
    if plan == "recompute":
        return 0
    budget = workspace_bytes(memory_budget, projection.hidden.device)
    return plans.autograd(projection.n_rows, backend.chunk_row_bytes(projection, False), budget, plan).rows


@_forward_op.register_fake
def _forward_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, row_inv_temperature, inv_temperature, logit_scale, softcap, entropy, second_moments,
    backend, memory_budget, compact, debug, plan, group, shard,
):  # fmt: skip
    projection = Projection(
        hidden, weight, bias, inv_temperature, row_inv_temperature, logit_scale, softcap, _shard(group, shard)
    )
    room = 0
    if plan != "recompute":
        room = _kept_rows(projection, dispatch.resolve(backend, projection, "autograd"), memory_budget, plan)
    n = hidden.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = hidden.new_empty(n, dtype=dtype)
    return (
        row,
        hidden.new_empty(n if entropy else 0, dtype=dtype),
        torch.empty_like(row),
        hidden.new_empty(3, n if second_moments else 0, dtype=dtype),
        hidden.new_empty(3, n, dtype=dtype),
        hidden.new_empty(
            room, weight.shape[0] if room else 0, dtype=projection.operand_dtype
        ),  # at most: masked rows are not kept
        hidden.new_empty(2, room, dtype=dtype),
        targets.new_empty(0),
    )


@torch.library.custom_op("eapo_kernels::token_stats_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_inv_temperature: Tensor | None,
    logp: Tensor,
    state: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    matrix: Tensor,
    factors: Tensor,
    kept_index: Tensor,
    inv_temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    memory_budget: int | None,
    compact: bool,
    group: str,
    shard: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias); what is not needed has no elements."""
    projection = Projection(
        hidden, weight, bias, inv_temperature, row_inv_temperature, logit_scale, softcap, _shard(group, shard)
    )
    row_max, log_sum, mean = state.unbind(0)
    statistics = RowStatistics(logp, None, row_max, row_max, log_sum, mean)
    gradients = compute_gradients(
        projection,
        targets,
        statistics,
        LogitCotangents(grad_logp, grad_entropy, grad_lse),
        dispatch.resolve(backend, projection, "autograd"),
        needs=(need_hidden, need_weight, need_bias),
        options=Options(memory_budget, compact),
        kept=Kept(matrix, factors, kept_index if kept_index.numel() else None) if factors.numel() else None,
    )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _backward_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, row_inv_temperature, logp, state, grad_logp, grad_entropy, grad_lse, matrix, factors,
    kept_index, inv_temperature, logit_scale, softcap, need_hidden, need_weight, need_bias, backend, memory_budget, compact,
    group, shard,
):  # fmt: skip
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, row_inv_temperature, *scalars = inputs
    logp, _, _, moments, state, matrix, factors, kept_index = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(moments, state, matrix, factors, kept_index)
    ctx.save_for_backward(hidden, weight, bias, targets, row_inv_temperature, logp, state, matrix, factors, kept_index)
    ctx.scalars = scalars


def _backward(ctx, grad_logp, grad_entropy, grad_lse, *_):  # type: ignore[no-untyped-def]
    inv_temperature, logit_scale, softcap, entropy, _, backend, memory_budget, compact, _, _, group, shard = ctx.scalars
    hidden, weight, bias, targets, row_inv_temperature, logp, state, matrix, factors, kept_index = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if grad_logp is None and grad_lse is None and (grad_entropy is None or not entropy):
        return (None,) * 17
    if grad_lse is not None or (grad_entropy is not None and entropy):
        matrix, factors = matrix[:0], factors[:0]  # what is kept is the gradient of logp alone
    gradients = _backward_op(
        hidden, weight, bias, targets, row_inv_temperature, logp, state, grad_logp, grad_entropy if entropy else None,
        grad_lse, matrix, factors, kept_index, inv_temperature, logit_scale, softcap, *needs, backend,
        memory_budget, compact, group, shard,
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 14)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def project_stats(
    projection: Projection, targets: Tensor, *, entropy: str, second_moments: bool, backend: str, options: Options
) -> TokenStats:
    """``token_stats`` of a checked projection; targets: [N] int64, -100 leaves a row out. Returns [N] each.

    The gradient matrix of the rows that fit the memory budget is kept for a backward of log-probs alone.
    """
    leaves = (projection.hidden, projection.weight, projection.bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    shard = projection.shard
    keep = wanted and entropy != "grad" and not second_moments and not torch.compiler.is_compiling()
    logp, entropies, lse, moments, *_ = _forward_op(
        projection.hidden,
        projection.weight,
        projection.bias,
        targets,
        projection.row_inv_temperature,
        projection.inv_temperature,
        projection.logit_scale,
        projection.softcap,
        entropy != "none",
        second_moments,
        backend,
        of_options(options),
        options.compact,
        options.debug,
        options.plan if keep else "recompute",
        "" if shard is None else shard.group,
        () if shard is None else (shard.start, shard.total, shard.max_shard_vocab),
    )
    return TokenStats(
        logp,
        None if entropy == "none" else entropies if entropy == "grad" else entropies.detach(),
        lse,
        *(moments.unbind(0) if second_moments else (None, None, None)),
    )


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
    process_group: dist.ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
    options: Options | None = None,
) -> TokenStats:
    """Log-prob, entropy and lse of every token, without the logits (docs/math.md E1-E6).

    Args:
        hidden: [..., D] bf16/fp16/fp32 (fp64 on the torch backend), hidden states at the positions that predict ``targets``.
        weight: [V, D], the head's weight, dtype and device of ``hidden``.
        targets: [...] int64, the sampled token at each position (already shifted); -100 leaves a row out of the results, and on
            a CPU or with a mask of the work (``Options.compact``).
        bias: [V] or None; -inf removes a column (under a soft-cap, which maps -inf to -softcap, it only lowers it).
        inv_temperature: 1 / temperature > 0, a number or a tensor [...].
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: factor on the logits before the soft-cap, or None.
        mask: [...] bool or None, False leaves a row out.
        entropy: "grad" (differentiable), "nograd" (value only), "none" (not computed, ``stats.entropy`` is None).
        second_moments: also return sum p^2, sum p^2 log p and the varentropy.
        process_group: the processes over which the rows of ``weight`` and ``bias`` are split in the order of their ranks, into
            parts of any sizes (tensor parallelism of the head), or this process's ``VocabShard``; None: they are whole.
            ``weight`` is then this process's part; ``targets`` stay tokens of the whole vocabulary. Every process of the group
            makes the same call with the same other arguments and the same loss from it. The results are the same bits on all;
            d_hidden is the whole one on all (do not reduce it again), d_weight and d_bias are the part's. With a group, what
            one process refuses, and arguments that differ (but for the values of ``hidden``), raise on every process, in one
            exchange before the work; with a VocabShard nothing is exchanged. An error that no check foresees (no memory left
            on one process, tensors on another kind of device) leaves the others in a collective until its time-out.
        backend: "auto", "torch" or "triton".
        options: memory budget and the like.

    Returns:
        TokenStats of [...] fp32 tensors (fp64 for fp64 inputs). Left-out rows are exact zeros, have zero gradient and cost
        nothing.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: a value is out of range (targets and tensor temperatures: on CUDA only with ``Options(debug=True)``, else the
            row of such a target is NaN), or an option is unknown; the processes of a group differ, or one of them has no rows.
        BackendUnavailable: the backend named cannot run these inputs.
    """
    with propagate_errors(process_group, weight, hidden):
        options = Options() if options is None else options
        require(isinstance(options, Options), "options", "Options or None", options)
        require(entropy in ENTROPY_MODES, "entropy", f"one of {', '.join(ENTROPY_MODES)}", repr(entropy))
        if not isinstance(targets, Tensor):
            raise ShapeError(f"targets: expected an int64 tensor [...], got {describe(targets)}")
        options, shape = resolve_compaction(options, targets, mask is not None), targets.shape
        projection = build_projection(hidden, weight, bias, inv_temperature, softcap, logit_scale, shape)
        require_tensor("targets", targets, tuple(shape), (torch.int64,), projection.hidden)
        if mask is not None:
            require_tensor("mask", mask, tuple(shape), (torch.bool,), projection.hidden)
            targets = torch.where(mask, targets, IGNORE_INDEX)
        require(options.plan != "chunks", "Options.plan", "auto, one_chunk or recompute with the autograd schedule", "'chunks'")
        targets = targets.reshape(-1)
        wanted: dict[str, Fact] = {"entropy": entropy, "second_moments": second_moments}
        facts = call_signature(process_group, "token_stats", projection, backend, "autograd", options, **wanted)
    projection = split_over(process_group, projection, targets, facts)
    flat = project_stats(projection, targets, entropy=entropy, second_moments=second_moments, backend=backend, options=options)
    return TokenStats._make(None if values is None else values.reshape(shape) for values in flat)
