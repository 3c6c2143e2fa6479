"""Advantages, the split into positive and negative responses, and rewards without labels.

All take and return vectors [B] and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EapoError, may_read, require_tensor
from .grouping import Groups, Partition

Advantage = Callable[[Tensor, Tensor], Tensor]
"""(rewards [B], group_ids [B]) -> advantages [B] fp32: a name in ``ADVANTAGES``, or a function."""

_EPS = 1e-6


def _normalised(groups: Groups) -> Tensor:
    return (groups.deviations() / (groups.unbiased_std() + _EPS)).float()


def group_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) in the group, unbiased std; 0 for equal rewards.

    Source: GRPO, arXiv 2402.03300.
    """
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
    """+1 for a correct response (r = 1), -1 for a wrong one (r = 0) (arXiv 2506.01347).

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


class Split(NamedTuple):
    """The sign split (E9, E10): a response is positive when value > threshold, not at a tie.

    Attributes:
        values: [B] fp32.
        thresholds: [B] fp32.
    """

    values: Tensor
    thresholds: Tensor

    def positive(self) -> Tensor:
        """[B] bool."""
        return self.values > self.thresholds


def _above_mean(rewards: Tensor, groups: Groups) -> Split:
    return Split(rewards.float(), (groups.means + groups.tie_width()).float())


def by_group(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """Against the reward mean of the response's group."""
    assert rewards is not None
    return _above_mean(rewards, Groups(rewards, group_ids))


def by_batch(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """Against the reward mean of the whole batch."""
    assert rewards is not None
    return _above_mean(rewards, Groups(rewards, None))


def by_advantage(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """By the sign of the advantage."""
    return Split(advantages, torch.zeros_like(advantages))


SPLITS = MappingProxyType({"group": by_group, "batch": by_batch, "advantage": by_advantage})


def semantic_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: the share of the group's answers in the response's own cluster.

    Source: EMPO, arXiv 2504.05812. A group in which every answer differs from all others (the
    semantic entropy is log G) gets zeros. The caller decides which answers mean the same.

    Args:
        cluster_ids: [B] int64, equal for answers of a group that mean the same; negative: no
            answer, reward 0.
        group_ids: [B] int64.
    """
    own, size = _cluster_and_group_sizes(cluster_ids, group_ids)
    largest = Partition(group_ids).max(torch.where(cluster_ids >= 0, own, 0.0))
    return torch.where((cluster_ids >= 0) & (largest > 1), own / size, 0.0).float()


def majority_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: 1 for answers of the group's largest clusters, else 0.

    All clusters of the largest size get 1. Arguments as in ``semantic_rewards``. Source: test-time
    reinforcement, arXiv 2504.16084; SPINE, arXiv 2511.17938, builds on it.
    """
    own, _ = _cluster_and_group_sizes(cluster_ids, group_ids)
    own = torch.where(cluster_ids >= 0, own, 0.0)
    return ((cluster_ids >= 0) & (own == Partition(group_ids).max(own))).float()


def _cluster_and_group_sizes(cluster_ids: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B] fp64: size of the response's cluster and of its group."""
    require_tensor("cluster_ids", cluster_ids, tuple(group_ids.shape), (torch.int64,), group_ids)
    groups = Partition(group_ids)
    span = (cluster_ids.clamp_min(-1) + 1).amax() + 1 if cluster_ids.numel() else 1
    return Partition(groups.index * span + cluster_ids.clamp_min(-1) + 1).counts, groups.counts
