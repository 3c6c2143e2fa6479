"""Reductions: the weight of each token in the sum of the per-token terms."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import traced
from ..errors import EapoError

REDUCTIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "fixed_length")


def token_scale(
    reduction: str, valid: Tensor, sequence_ids: Tensor, here: Tensor, tokens: Tensor, *, fixed_length: int | None,
    lengths: Tensor | None = None, denominator: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[N] fp32, the weight of each valid token; 0 for the others. reduction: one of ``REDUCTIONS``.

        token_mean            1 / tokens: every token counts the same (DAPO)
        seq_mean_token_mean   1 / (length of its response * responses): every response does (GRPO)
        seq_mean_token_sum    1 / responses
        fixed_length          1 / (responses * fixed_length): no length bias (Dr. GRPO)

    Args:
        valid: [N] bool.
        sequence_ids: [N] int64 in [0, B); 0 at tokens that are not valid.
        here, tokens: [B] and 0-dim fp32, valid tokens of each response in this batch, and of all.
        fixed_length: the constant of reduction ``fixed_length``, which raises EapoError without it.
        lengths: [B] valid tokens of each response everywhere; None: ``here``.
        denominator: tokens or responses of all micro-batches and ranks, whose losses then add up; None: those here.
    """
    if isinstance(denominator, Tensor):
        count = denominator.to(here.device, torch.float32)
    elif denominator is not None:
        count = traced.scalar(denominator, here.device)
    else:
        count = (tokens if reduction == "token_mean" else (here > 0).sum().float()).clamp_min(1)
    if reduction == "seq_mean_token_mean":
        count = (here if lengths is None else lengths.float()).clamp_min(1)[sequence_ids] * count
    elif reduction == "fixed_length":
        if fixed_length is None:
            raise EapoError("fixed_length: expected a positive int with reduction 'fixed_length', got None")
        count = count * fixed_length
    return valid / count
