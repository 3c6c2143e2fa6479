"""The global denominator of a loss that is computed in micro-batches."""

from __future__ import annotations

from torch import Tensor

from ..types import TokenBatch
from .batch import check_batch
from .controllers import EntropyRatio
from .methods import Method, get_method
from .policy import prepare, resolve_positive_weight


def loss_denominator(
    batch: TokenBatch, *, method: str | Method, positive_weight: float | Tensor | EntropyRatio | None = None
) -> Tensor:
    """``TokenBatch.denominator`` for the parts of a batch, so that their losses add up to its loss.

    Args:
        batch: all tokens of one optimizer step on this rank, after ``weight_tokens`` if the method
            weighs tokens. Sum the result over the ranks. ``batch.denominator`` is not read.
        method, positive_weight: as in ``policy_loss``.

    Returns:
        0-dim fp32: tokens that count for ``token_mean``, responses with such tokens for the other
        reductions, without those that ``drop_zero_weight`` drops; at least 1.
    """
    method = get_method(method)
    check_batch(batch, method.config, debug=False)
    lam = resolve_positive_weight(method, positive_weight, batch.targets.device, False)
    terms = prepare(batch, method.config, lam)
    count = terms.tokens if method.config.reduction == "token_mean" else (terms.lengths > 0).sum().float()
    return count.clamp_min(1)
