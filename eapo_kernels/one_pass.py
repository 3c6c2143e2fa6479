"""The one-pass schedule of a policy loss: per-token maths between a chunk's two matrix products, gradients handed out later."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import EapoError
from .objectives.policy import PolicyTerms, loss_and_sums
from .ops import dispatch
from .ops.backend import Chunk, Coefficients, LogitCotangents, SurrogateTerms
from .ops.policy_gradient import policy_gradient
from .ops.projection import Projection
from .ops.rows import may_compact, valid_index
from .ops.weight_gradient import MainGrad
from .types import Options


def one_pass(
    projection: Projection,
    targets: Tensor,
    terms: PolicyTerms,
    backend_name: str,
    options: Options,
    main_grad: MainGrad | None = None,
    *,
    metrics: bool = True,
) -> tuple[Tensor, Tensor]:
    """(loss, sums) with the gradients computed along the way; ``loss.backward()`` hands them out.

    targets: [N] int64, -100 where ``terms.valid`` is False. main_grad: takes the weight's gradient here and now. metrics: the
    sums are wanted; else entropies are not computed unless the loss needs them.
    """
    inputs = (projection.hidden, projection.weight, projection.bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
    needs = (wanted[0], wanted[1] or (main_grad is not None and torch.is_grad_enabled()), wanted[2])
    targets = torch.where(terms.valid, targets, 0)
    detached = replace(
        projection,
        hidden=projection.hidden.detach(),
        weight=projection.weight.detach(),
        bias=None if projection.bias is None else projection.bias.detach(),
    )
    backend = dispatch.resolve(backend_name, projection, "one_pass")
    n_rows, index = projection.n_rows, None
    if not may_compact(targets, options.compact):
        detached = detached.zero_invalid_rows(terms.valid)
    elif (index := valid_index(terms.valid)) is not None:
        detached, targets, terms = detached.rows(index), targets[index], terms.rows(index)
    entropy_gradient = terms.has_entropy_bonus
    fused = backend.surrogate if _is_clipped_surrogate(terms) else None

    def coefficients(chunk: Chunk, rows: slice) -> Coefficients:
        part = terms.rows(rows)
        if fused is not None:
            return fused(chunk, _surrogate_terms(part))
        stats = chunk.statistics()
        with torch.enable_grad():
            logp = stats.logp.detach().requires_grad_()
            entropy = None if stats.entropy is None else stats.entropy.detach().requires_grad_(entropy_gradient)
            loss, sums = loss_and_sums(part, logp, entropy)
            if not any(needs):
                return Coefficients(LogitCotangents(None), sums)
            leaves = [logp, entropy] if entropy is not None and entropy_gradient else [logp]
            gradients = torch.autograd.grad(loss, leaves)
        return Coefficients(LogitCotangents(*gradients), sums)

    result = policy_gradient(
        detached, targets, index, n_rows, coefficients, backend,
        entropy=metrics or entropy_gradient, entropy_gradient=entropy_gradient, logp_guess=terms.old_logp, needs=needs,
        options=options, main_grad=main_grad,
    )  # fmt: skip
    loss = _Stored.apply(result.sums[0], *inputs, (result.d_hidden, result.d_weight, result.d_bias))
    return loss, result.sums


def _is_clipped_surrogate(terms: PolicyTerms) -> bool:
    """Whether the loss is what ``SurrogateTerms`` can say."""
    c = terms.config
    plain = c.surrogate == "ppo_clip" and not terms.has_entropy_bonus and terms.ref_logp is None and terms.ratio_penalty is None
    return plain and terms.old_logp is not None and not terms.token_advantages


def _surrogate_terms(terms: PolicyTerms) -> SurrogateTerms:
    assert terms.old_logp is not None
    c = terms.config
    return SurrogateTerms(
        sequence_ids=terms.sequence_ids,
        old_logp=terms.old_logp,
        scale=terms.scale if terms.importance is None else terms.scale * terms.importance,
        advantages=terms.advantages,
        rewards=terms.split.values,
        thresholds=terms.split.thresholds,
        positive_weight=terms.positive_weight,
        negative_weight=c.negative_weight,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip,
        valid=terms.valid,
    )


class _Stored(torch.autograd.Function):
    """A loss whose gradients are already known; backward scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, gradients: Any) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise EapoError("backward: expected one call per one_pass loss, got a second one; use schedule='autograd'")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.mul_(grad_loss).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return (None, *scaled, None)
