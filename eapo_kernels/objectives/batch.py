"""Checks of a ``TokenBatch``.

Shapes, dtypes and devices are checked always; values where they may be read (``checks.may_read``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FLOATS, EapoError, ShapeError, describe, may_read, require, require_scalar, require_tensor
from ..types import TokenBatch, valid_tokens
from .config import EAPOConfig


def n_sequences(batch: TokenBatch) -> int:
    """B, from the rewards, groups or lengths, else from the advantages.

    Advantages per token allow at most one response a token.
    """
    for per_sequence in (batch.rewards, batch.group_ids, batch.sequence_lengths, batch.advantages):
        if isinstance(per_sequence, Tensor):
            return per_sequence.numel()
    return 0


def has_token_advantages(batch: TokenBatch) -> bool:
    """Whether the advantages are [N]; where N = B, ``check_batch`` makes both readings equal."""
    if batch.advantages is not None and batch.token_advantages is not None:
        return batch.token_advantages
    if batch.advantages is None or batch.advantages.shape != batch.targets.shape:
        return False
    known = any(t is not None for t in (batch.rewards, batch.group_ids, batch.sequence_lengths))
    return not known or n_sequences(batch) != batch.targets.numel()


def check_batch(batch: TokenBatch, config: EAPOConfig, *, debug: bool) -> None:
    """Raise unless the batch fits together and has what the loss needs.

    Raises:
        ShapeError: a shape, dtype or device does not fit.
        EapoError: something the loss needs is missing, a reward or log-prob is not finite, a
            sequence id is out of range.
    """
    require(isinstance(batch, TokenBatch), "batch", "a TokenBatch", batch)
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
    if batch.rewards is not None and config.split == "group":
        require(batch.group_ids is not None, "batch.group_ids", "[B] with split='group'", None)
    if batch.denominator is not None:
        require_scalar("batch.denominator", batch.denominator, "a number or a 0-dim tensor")
    for name, value in (("rewards", batch.rewards), ("sequence_lengths", batch.sequence_lengths)):
        if value is not None:
            dtypes = FLOATS if name == "rewards" else (*FLOATS, torch.int64, torch.int32)
            require_tensor(f"batch.{name}", value, (size,), dtypes, targets)
    if batch.group_ids is not None:
        require_tensor("batch.group_ids", batch.group_ids, (size,), integers, targets)
    if batch.advantages is not None:
        per_token = tuple(getattr(batch.advantages, "shape", ())) == tokens
        per_token = per_token if batch.token_advantages is None else batch.token_advantages
        require_tensor("batch.advantages", batch.advantages, tokens if per_token else (size,), FLOATS, targets)
    if batch.mask is not None:
        require_tensor("batch.mask", batch.mask, tokens, (torch.bool,), targets)
    for name in ("entropy_coef", "ratio_penalty"):
        if getattr(batch, name) is not None:
            require_tensor(f"batch.{name}", getattr(batch, name), tokens, FLOATS, targets)
    _check_log_probs(batch, config, tokens)
    if may_read(targets, debug):
        _check_values(batch, config, size)


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


def _check_values(batch: TokenBatch, config: EAPOConfig, size: int) -> None:
    valid = valid_tokens(batch.targets, batch.mask)
    everything = torch.ones((), dtype=torch.bool, device=valid.device)
    _require_finite("rewards", batch.rewards, everything)
    _require_finite("advantages", batch.advantages, valid if has_token_advantages(batch) else everything)
    for name in ("old_logp", "ref_logp", "rollout_logp", "entropy_coef", "ratio_penalty"):
        _require_finite(name, getattr(batch, name), valid)

    ids = batch.sequence_ids[valid]
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < size):
        got = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise EapoError(f"batch.sequence_ids: expected values in [0, {size}), got {got}")
    n = batch.targets.numel()
    if batch.advantages is not None and batch.token_advantages is None and batch.advantages.numel() == n and ids.numel():
        one_each = size == n and int(ids.max()) == n - 1 if has_token_advantages(batch) else True
        if one_each and not torch.equal(batch.sequence_ids, torch.arange(n, device=ids.device)):
            raise EapoError(
                f"batch.advantages: expected [B] or [N] with B != N (or sequence_ids 0, 1, 2, ...), got B = N = {n}"
            )
    if batch.denominator is not None:
        value = float(batch.denominator)
        require(0 < value < math.inf, "batch.denominator", "a positive finite number", value)
    if batch.sequence_lengths is not None:
        counts = torch.bincount(ids, minlength=size)
        lengths = batch.sequence_lengths
        short = ~(lengths >= counts)
        if bool(short.any()):
            i = int(short.nonzero()[0, 0])
            raise EapoError(
                f"batch.sequence_lengths: expected at least {int(counts[i])}, the tokens here, got {float(lengths[i])} at {i}"
            )
        if config.scope == "sequence" and bool(((lengths != counts) & (counts > 0)).any()):
            raise EapoError(f"batch.sequence_lengths: expected whole responses with surrogate {config.surrogate!r}, got parts")


def _require_finite(name: str, values: Tensor | None, where: Tensor) -> None:
    if values is None:
        return
    bad = ~values.isfinite() & where
    if bool(bad.any()):
        place = int(bad.nonzero()[0, 0])
        raise EapoError(f"batch.{name}: expected finite numbers, got {float(values[place])} at {place}")
