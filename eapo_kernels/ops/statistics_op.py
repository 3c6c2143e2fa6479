"""What the custom ops of token statistics share: their outputs, the fake ones of a trace, and autograd.

Both ops return logp, entropy, lse [N], moments, state [3, N], and what else their backward op reads. A
result that is not asked for is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import TokenStats
from .dispatch import RowStatistics

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def outputs(s: RowStatistics, *, entropy: bool) -> Outputs:
    """The outputs of these statistics, no two of which share memory."""
    moments = s.logp.new_empty(3, 0)
    if s.p2 is not None and s.p2_logp is not None and s.varentropy is not None:
        moments = torch.stack([s.p2, s.p2_logp, s.varentropy])
    mean = torch.zeros_like(s.logp) if s.mean_shifted is None else s.mean_shifted
    entropies = s.entropy.clone() if entropy and s.entropy is not None else s.logp.new_empty(0)
    return s.logp, entropies, s.lse.clone(), moments, torch.stack([s.row_offset, s.log_sum, mean])


def fake_outputs(hidden: Tensor, *, entropy: bool, second_moments: bool) -> Outputs:
    """``outputs`` as a trace sees them."""
    n, dtype = hidden.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shapes = (n,), (n if entropy else 0,), (n,), (3, n if second_moments else 0), (3, n)
    logp, entropies, lse, moments, state = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return logp, entropies, lse, moments, state


def token_stats_of(found: tuple[Tensor, ...], *, entropy: bool, second_moments: bool) -> TokenStats:
    """The public record of an op's outputs."""
    logp, entropies, lse, moments, *_ = found
    return TokenStats(logp, entropies if entropy else None, lse, *(moments.unbind(0) if second_moments else (None, None, None)))


def statistics_of(logp: Tensor, state: Tensor) -> RowStatistics:
    """What a gradient needs of the statistics, from the outputs."""
    row_offset, log_sum, mean = state.unbind(0)
    return RowStatistics(logp, None, row_offset, row_offset, log_sum, mean)


def fake_gradients(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight and d_bias as a trace sees them; the last argument says which are needed."""
    need_hidden, need_weight, need_bias = arguments[-1]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else hidden.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_bias else hidden.new_empty(0),
    )


def register_gradients(forward: Any, backward: Any, *, operands: int, others: int, entropy: int) -> None:
    """Autograd of the op ``forward`` by the op ``backward``, and the fake of the latter.

    forward: its first ``operands`` arguments are tensors, hidden, weight and bias before all others; the
        one at place ``entropy`` says whether the entropy is an output.
    backward: takes these tensors, the next ``others`` arguments, logp, state and the outputs behind it,
        the three cotangents, and which of d_hidden, d_weight and d_bias are needed. It returns these
        three, empty where not needed.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logp, _, _, moments, *kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments, *kept)
        ctx.save_for_backward(*inputs[:operands], logp, *kept)
        ctx.others, ctx.entropy, ctx.count = inputs[operands : operands + others], inputs[entropy], len(inputs)

    def gradients(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, *_: Any) -> Any:
        saved = ctx.saved_tensors  # read once: saved-tensor hooks (activation checkpointing, offload) run at every read
        needs, grad_entropy = ctx.needs_input_grad[:3], grad_entropy if ctx.entropy else None
        if grad_logp is None and grad_lse is None and grad_entropy is None:
            return (None,) * ctx.count
        found = backward(*saved[:operands], *ctx.others, *saved[operands:], grad_logp, grad_entropy, grad_lse, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * (ctx.count - 3))

    backward.register_fake(fake_gradients)
    forward.register_autograd(gradients, setup_context=setup_context)
