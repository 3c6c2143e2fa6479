"""The predicted entropy change of an update, and its parts (docs/math.md, "Entropy dynamics").

Vector maths on the old policy's statistics, one number per token; no logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FLOATS, require, require_tensor
from .objectives.batch import check_batch
from .objectives.controllers import EntropyRatio
from .objectives.methods import Method, get_method
from .objectives.policy import loss_and_sums, prepare, resolve_positive_weight
from .objectives.token_weights.entropy_change import expected_part, sampled_part
from .types import TokenBatch, TokenStats, valid_tokens


class TokenWeights(NamedTuple):
    """The effective weights of a loss: L = -sum_t (w_t log p_t + c_t H_t) to first order.

    Attributes:
        logp: [N] fp32 w_t = -dL/dlog p_t: reduction, advantage, sign weight, clip and penalties
            together.
        entropy: [N] fp32 c_t = -dL/dH_t.
    """

    logp: Tensor
    entropy: Tensor


def token_weights(
    method: str | Method,
    batch: TokenBatch,
    logp: Tensor | None = None,
    *,
    positive_weight: float | Tensor | EntropyRatio | None = None,
) -> TokenWeights:
    """The effective weights of a batch under any method's loss.

    Args:
        method, positive_weight: as in ``policy_loss``.
        batch: as in ``policy_loss``, with token weights where the method has them.
        logp: [N] log-probs under the present policy (nats); None: those of the old policy, ratio 1.

    Raises:
        EapoError, ShapeError: as ``policy_loss``; or neither ``logp`` nor ``batch.old_logp`` is
            given.
    """
    method = get_method(method)
    check_batch(batch, method.config, debug=False)
    at = batch.old_logp if logp is None else logp
    require(at is not None, "logp", "[N], or a batch with old_logp", None)
    assert at is not None
    require_tensor("logp", at, tuple(batch.targets.shape), FLOATS, batch.targets)
    factor = resolve_positive_weight(method, positive_weight, at.device, False)
    if batch.old_logp is None:
        batch = replace(batch, old_logp=at)
    terms = prepare(batch, method.config, factor)
    with torch.enable_grad():
        own = at.detach().float().requires_grad_()
        entropy = torch.zeros_like(own).requires_grad_()
        loss, _ = loss_and_sums(terms, own, entropy)
        w, c = torch.autograd.grad(loss, [own, entropy], allow_unused=True, materialize_grads=True)
    return TokenWeights(-w, -c)


def polarity(stats: TokenStats) -> Tensor:
    """[...] fp64 D_y = p_y (log p_y + H) - sum_v p_v^2 (log p_v + H) (E7).

    D_y > 0: reinforcing the token contracts the entropy. E[D_y] = 0 over tokens drawn from the
    policy.

    Raises:
        EapoError: the statistics lack the entropy or the second moments.
    """
    require(stats.entropy is not None, "stats.entropy", "a tensor", None)
    require(stats.p2 is not None and stats.p2_logp is not None, "stats.p2, stats.p2_logp", "second_moments=True", None)
    return sampled_part(stats) - expected_part(stats)


def score_norm(stats: TokenStats) -> Tensor:
    """[...] fp64 ||grad_z log p_y||^2 = 1 - 2 p_y + sum p^2, z the token's logits.

    Computed as (1 - p_y)^2 + sum_{v != y} p_v^2, which has no cancellation. The network's Jacobian
    is not part of it.
    """
    require(stats.p2 is not None, "stats.p2", "second_moments=True", None)
    assert stats.p2 is not None
    log_p = stats.logp.double()
    return log_p.expm1().square() + (stats.p2.double() - (2 * log_p).exp()).clamp_min(0)


def entropy_change(stats: TokenStats, weights: Tensor) -> Tensor:
    """[...] fp64 predicted entropy change of a token, nats per unit of step size: -w_t D_t (E7).

    First order, for a step of gradient ascent on w_t log p_t in the logits of that token alone. A
    network shares its parameters between tokens and an optimizer rescales them, so use signs and
    relative sizes; the absolute size needs a comparison with the measured change. The entropy bonus
    is not included.

    Args:
        stats: statistics of the policy that is updated, with second moments.
        weights: [...] w_t, for example ``token_weights(...).logp``.
    """
    require_tensor("weights", weights, tuple(stats.logp.shape), FLOATS, stats.logp)
    return -weights.double() * polarity(stats)


def diagnose(stats: TokenStats, weights: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Metrics of an update with these weights, 0-dim fp32. Nothing synchronizes.

    Args:
        stats: [N], with entropy and second moments.
        weights: [N] effective weights w_t. A token is positive or negative by its sign; zero is
            neither.
        valid: [N] bool or None, tokens that count.

    Returns:
        ``dynamics/predicted_entropy_change``: sum of ``entropy_change`` over the tokens, nats per
            unit of logit step. With the weights of a token-mean loss, which contain 1 / N, it is
            the change of the mean entropy when every token's logits take a step of N times their
            gradient. ``dynamics/contracting_positive``, ``dynamics/contracting_negative``: share of
            the positive (negative) tokens with D_y > 0: reinforcing them contracts the entropy,
            suppressing them expands it. ``dynamics/expanding_positive``,
            ``dynamics/expanding_negative``: the same for D_y < 0.
            ``dynamics/positive_gradient_norm``, ``dynamics/negative_gradient_norm``: sqrt(sum w_t^2
            ||grad_z log p_t||^2) over the positive (negative) tokens, in all tokens' logits.
            ``dynamics/positive_gradient_share``: positive share of the squared norm (the two parts
            are orthogonal); 0 without any gradient.
    """
    if valid is None:
        valid = torch.ones_like(stats.logp, dtype=torch.bool)
    require_tensor("valid", valid, tuple(stats.logp.shape), (torch.bool,), stats.logp)
    require_tensor("weights", weights, tuple(stats.logp.shape), FLOATS, stats.logp)
    w = torch.where(valid, weights.double(), 0.0)
    direction, norm = polarity(stats), score_norm(stats)
    metrics = {"predicted_entropy_change": torch.where(valid, -w * direction, 0.0).sum()}
    squares = {}
    for side, chosen in {"positive": w > 0, "negative": w < 0}.items():
        count = chosen.sum().clamp_min(1)
        metrics[f"contracting_{side}"] = (chosen & (direction > 0)).sum() / count
        metrics[f"expanding_{side}"] = (chosen & (direction < 0)).sum() / count
        squares[side] = torch.where(chosen, w.square() * norm, 0.0).sum()
        metrics[f"{side}_gradient_norm"] = squares[side].sqrt()
    metrics["positive_gradient_share"] = squares["positive"] / (squares["positive"] + squares["negative"]).clamp_min(1e-300)
    return {f"dynamics/{name}": value.float() for name, value in metrics.items()}


def diagnose_batch(
    method: str | Method, batch: TokenBatch, stats: TokenStats, *, positive_weight: float | Tensor | EntropyRatio | None = None
) -> dict[str, Tensor]:
    """``diagnose`` with the weights of the method's loss on this batch, at the old policy."""
    at = batch.old_logp if batch.old_logp is not None else stats.logp
    weights = token_weights(method, batch, at, positive_weight=positive_weight)
    return diagnose(stats, weights.logp, valid_tokens(batch.targets, batch.mask))
