"""A ``TokenBatch``, checked: shapes, dtypes and devices always; values always on the CPU, on CUDA with ``debug``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATS, describe, require_tensor
from ..errors import EapoError, ShapeError, require
from ..types import IGNORE_INDEX, TokenBatch
from .config import EAPOConfig


def n_sequences(batch: TokenBatch) -> int:
    """B: from the rewards, else the lengths, else the advantages (per token: at most one response a token)."""
    for per_sequence in (batch.rewards, batch.sequence_lengths):
        if per_sequence is not None:
            return per_sequence.numel()
    return 0 if batch.advantages is None else batch.advantages.numel()


def check_batch(batch: TokenBatch, config: EAPOConfig, *, debug: bool) -> None:
    """Raise unless the batch fits together and has what the loss needs.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: something the loss needs is missing, a reward or log-prob is not finite, a sequence id is out of range.
    """
    targets = batch.targets
    if not (isinstance(targets, Tensor) and targets.dim() == 1 and targets.dtype == torch.int64):
        raise ShapeError(f"batch.targets: expected int64 [N], got {describe(targets)}")
    tokens, integers = tuple(targets.shape), (torch.int64,)
    require_tensor("batch.sequence_ids", batch.sequence_ids, tokens, integers, targets)
    if batch.advantages is None:
        missing = "rewards" if batch.rewards is None else "group_ids"
        complete = batch.rewards is not None and batch.group_ids is not None
        require(complete, f"batch.{missing}", "[B] unless advantages are given", None)
    size = n_sequences(batch)
    for name, value in (("rewards", batch.rewards), ("sequence_lengths", batch.sequence_lengths)):
        if value is not None:
            dtypes = FLOATS if name == "rewards" else (*FLOATS, torch.int64, torch.int32)
            require_tensor(f"batch.{name}", value, (size,), dtypes, targets)
    if batch.group_ids is not None:
        require_tensor("batch.group_ids", batch.group_ids, (size,), integers, targets)
    if batch.advantages is not None:
        per_token = tuple(getattr(batch.advantages, "shape", ())) == tokens
        require_tensor("batch.advantages", batch.advantages, tokens if per_token else (size,), FLOATS, targets)
    if batch.mask is not None:
        require_tensor("batch.mask", batch.mask, tokens, (torch.bool,), targets)
    _check_log_probs(batch, config, tokens)
    if debug or not targets.is_cuda:
        _check_values(batch, size)


def _check_log_probs(batch: TokenBatch, config: EAPOConfig, tokens: tuple[int, ...]) -> None:
    needed = {
        "old_logp": f"importance_cap={config.importance_cap}" if config.importance_cap is not None else None,
        "rollout_logp": f"importance_cap={config.importance_cap}" if config.importance_cap is not None else None,
        "ref_logp": f"kl_coef={config.kl_coef}" if config.kl_coef else None,
    }
    for name, reason in needed.items():
        value = getattr(batch, name)
        if value is not None:
            require_tensor(f"batch.{name}", value, tokens, FLOATS, batch.targets)
        else:
            require(reason is None, f"batch.{name}", f"[N] floats with {reason}", None)


def _check_values(batch: TokenBatch, size: int) -> None:
    for name in ("rewards", "advantages"):
        value = getattr(batch, name)
        if value is not None and not bool(value.isfinite().all()):
            place = int((~value.isfinite()).nonzero()[0, 0])
            raise EapoError(f"batch.{name}: expected finite numbers, got {float(value[place])} at {place}")
    ids = batch.sequence_ids
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < size):
        got = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise EapoError(f"batch.sequence_ids: expected values in [0, {size}), got {got}")
    valid = batch.targets != IGNORE_INDEX
    if batch.mask is not None:
        valid = valid & batch.mask
    for name in ("old_logp", "ref_logp", "rollout_logp"):
        value = getattr(batch, name)
        if value is not None and not bool((value.isfinite() | ~valid).all()):
            place = int((~value.isfinite() & valid).nonzero()[0, 0])
            raise EapoError(
                f"batch.{name}: expected finite log-probs where the mask is True, got {float(value[place])} at {place}"
            )
    if batch.denominator is not None:
        require(float(batch.denominator) > 0, "batch.denominator", "a positive number", float(batch.denominator))
