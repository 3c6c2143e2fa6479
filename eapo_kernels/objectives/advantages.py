"""Advantage estimators: rewards [B] and group numbers [B] to advantages [B] fp32. A name in a table, or any such function."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from ..checks import may_read
from ..errors import EapoError
from .grouping import Groups

Advantage = Callable[[Tensor, Tensor], Tensor]

_EPS = 1e-6


def _normalised(groups: Groups) -> Tensor:
    return (groups.deviations() / (groups.unbiased_std() + _EPS)).float()


def group_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) in the group, unbiased std; zero where the group has no spread (GRPO, arXiv 2402.03300)."""
    return _normalised(Groups(rewards, group_ids))


def group_mean(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783)."""
    return Groups(rewards, group_ids).deviations().float()


def sign(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """+1 above the group's mean, -1 below, 0 at it."""
    return Groups(rewards, group_ids).deviations().sign().float()


def batch_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) over all responses of the batch."""
    return _normalised(Groups(rewards, None))


def binary(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """+1 for a correct response (r = 1), -1 for a wrong one (r = 0): r and r - 1 of arXiv 2506.01347; no baseline.

    Raises:
        EapoError: a reward is neither 0 nor 1 (where it may be read: not on CUDA, not in a trace).
    """
    if may_read(rewards) and not bool(((rewards == 0) | (rewards == 1)).all()):
        raise EapoError(
            "rewards: expected 0 or 1 with advantage 'binary' (use 'sign' for graded rewards), "
            f"got {rewards[(rewards != 0) & (rewards != 1)][0].item():g}"
        )
    return torch.where(rewards > 0.5, 1.0, -1.0).float()


ADVANTAGES: MappingProxyType[str, Advantage] = MappingProxyType(
    {f.__name__: f for f in (group_norm, group_mean, sign, batch_norm, binary)}
)
