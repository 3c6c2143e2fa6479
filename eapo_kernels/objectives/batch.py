"""Checks of a ``TokenBatch``: shapes, dtypes, devices; values where ``may_read`` allows it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FLOATS, LARGEST, EapoError, ShapeError, describe, may_read, require, require_scalar, require_tensor
from ..support import require_support
from ..types import TOKEN_FLOATS, TokenBatch, valid_tokens
from .config import EAPOConfig

_OPTIONAL = (
    ("rewards", False, FLOATS), ("group_ids", False, (torch.int64,)), ("mask", True, (torch.bool,)),
    ("sequence_lengths", False, (*FLOATS, torch.int64, torch.int32)), *((name, True, FLOATS) for name in TOKEN_FLOATS),
)  # fmt: skip
"""(name, whether it is [N] and not [B], dtypes)."""


def n_sequences(batch: TokenBatch) -> int:
    """B, from the rewards, groups or lengths; else the number of advantages, a bound if [N]."""
    fields = (batch.rewards, batch.group_ids, batch.sequence_lengths, batch.advantages)
    return next((t.numel() for t in fields if isinstance(t, Tensor)), 0)


def has_token_advantages(batch: TokenBatch) -> bool:
    """Whether the advantages are [N]; where N = B, ``check_batch`` makes both readings equal."""
    if batch.advantages is None or batch.token_advantages is not None:
        return batch.advantages is not None and bool(batch.token_advantages)
    known = any(t is not None for t in (batch.rewards, batch.group_ids, batch.sequence_lengths))
    return batch.advantages.shape == batch.targets.shape and (not known or n_sequences(batch) != batch.targets.numel())


def check_batch(batch: TokenBatch, config: EAPOConfig, *, debug: bool) -> None:
    """Check that the fields of the batch fit together and include all that the loss needs.

    Raises ShapeError for a shape, dtype or device; EapoError for a missing field, a number that is
    not finite, a sequence id out of range, or a denominator or lengths that contradict the tokens.
    """
    require(isinstance(batch, TokenBatch), "batch", "a TokenBatch", batch)
    targets = batch.targets
    if not (isinstance(targets, Tensor) and targets.dim() == 1 and targets.dtype == torch.int64):
        raise ShapeError(f"batch.targets: expected int64 [N], got {describe(targets)}")
    if batch.advantages is None:
        for name in ("rewards", "group_ids"):
            require(getattr(batch, name) is not None, f"batch.{name}", "[B] unless advantages are given", None)
    if batch.rewards is not None and config.split == "group":
        require(batch.group_ids is not None, "batch.group_ids", "[B] with split='group'", None)
    if batch.denominator is not None:
        require_scalar("batch.denominator", batch.denominator, "a number or a 0-dim tensor")
    cap = None if config.importance_cap is None else f"importance_cap={config.importance_cap}"
    kl = f"kl_coef={config.kl_coef}" if config.kl_coef else None
    score = "surrogate='hapo'" if config.surrogate == "hapo" else None
    for name, reason in (("old_logp", cap), ("rollout_logp", cap), ("ref_logp", kl), ("entropy_score", score)):
        require(reason is None or getattr(batch, name) is not None, f"batch.{name}", f"[N] floats with {reason}", None)
    tokens, sequences = tuple(targets.shape), (n_sequences(batch),)
    require_tensor("batch.sequence_ids", batch.sequence_ids, tokens, (torch.int64,), targets)
    if batch.advantages is not None:
        per_token = tuple(getattr(batch.advantages, "shape", ())) == tokens
        per_token = per_token if batch.token_advantages is None else batch.token_advantages
        require_tensor("batch.advantages", batch.advantages, tokens if per_token else sequences, FLOATS, targets)
    for name, per_token, dtypes in _OPTIONAL:
        if (value := getattr(batch, name)) is not None:
            require_tensor(f"batch.{name}", value, tokens if per_token else sequences, dtypes, targets)
    single = config.drop_zero_weight and config.split == "advantage" and has_token_advantages(batch)
    if single and config.reduction == "seq_mean_token_mean" and batch.sequence_lengths is not None:
        raise EapoError("batch.sequence_lengths: expected None where drop_zero_weight drops single tokens, got a tensor")
    if batch.support is not None:
        require_support(batch.support, targets, "batch.support")
    if may_read(targets, debug):
        _check_values(batch, config, *sequences)


def _check_values(batch: TokenBatch, config: EAPOConfig, size: int) -> None:
    valid, per_token = valid_tokens(batch.targets, batch.mask), has_token_advantages(batch)
    _require_finite("rewards", batch.rewards, None)
    _require_finite("advantages", batch.advantages, valid if per_token else None)
    for name in TOKEN_FLOATS:
        _require_finite(name, getattr(batch, name), valid)
    ids, n = batch.sequence_ids[valid], batch.targets.numel()
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
    require(low >= 0 and high < size, "batch.sequence_ids", f"values in [0, {size})", low if low < 0 else high)
    if batch.advantages is not None and batch.token_advantages is None and batch.advantages.numel() == n and ids.numel():
        ambiguous = not per_token or (size == n and high == n - 1)
        if ambiguous and not torch.equal(batch.sequence_ids, torch.arange(n, device=ids.device)):
            raise EapoError(f"batch.advantages: expected [B] or [N] with B != N (or ids 0, 1, 2, ...), got B = N = {n}")
    if batch.denominator is not None:
        value = float(batch.denominator)
        require(1 / LARGEST <= value <= LARGEST, "batch.denominator", "a positive finite number", value)
    if batch.sequence_lengths is not None:
        counts, lengths = torch.bincount(ids, minlength=size), batch.sequence_lengths
        short = ~(lengths >= counts)
        if bool(short.any()):
            i = int(short.nonzero()[0, 0])
            raise EapoError(f"batch.sequence_lengths: expected at least {int(counts[i])} at {i}, got {float(lengths[i])}")
        if config.scope == "sequence" and bool(((lengths != counts) & (counts > 0)).any()):
            raise EapoError(f"batch.sequence_lengths: expected whole responses with surrogate {config.surrogate!r}, got parts")


def _require_finite(name: str, values: Tensor | None, where: Tensor | None) -> None:
    if values is not None:
        bad = ~(values.double().abs() <= LARGEST) & (True if where is None else where)
        if bool(bad.any()):
            got = f"{float(values[bad][0])} at {int(bad.nonzero()[0, 0])} (largest size: {LARGEST:g})"
            raise EapoError(f"batch.{name}: expected finite numbers, got {got}")
