"""What a trainer asks about all tokens of an optimizer step before it computes their loss in micro-batches."""

from __future__ import annotations

import torch
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


def idle_sequences(
    batch: TokenBatch, *, method: str | Method, positive_weight: float | Tensor | EntropyRatio | None = None
) -> Tensor:
    """The responses that can be left out of the forward pass: whatever the policy, they add nothing to
    the loss and its gradient (groups with equal rewards, responses of weight zero).

    Their tokens still count in ``loss_denominator``, and in the entropy that updates a controller.

    Args:
        batch: as in ``loss_denominator``, with all responses of a group.
        method, positive_weight: as in ``policy_loss``.

    Returns:
        [B] bool, True also for a response without tokens that count. With an entropy bonus, a KL or
        a penalty in the loss only those.
    """
    method = get_method(method)
    check_batch(batch, method.config, debug=False)
    terms = prepare(batch, method.config, resolve_positive_weight(method, positive_weight, batch.targets.device, False))
    return torch.zeros_like(terms.lengths).index_add_(0, terms.sequence_ids, terms.live().float()) == 0
