"""Rewards without labels, from clusters of answers that mean the same.

Vectors are [B], one element per response, and carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError, describe, require_tensor
from .grouping import Partition


def semantic_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: the share of the group's responses that are in the response's own cluster.

    A group whose answers are all different (its semantic entropy is log G) gets zeros.
    Source: EMPO, arXiv 2504.05812.

    Args:
        cluster_ids: [B] int64, equal for answers of a group that mean the same (the caller decides
            this); negative: the response has no answer and reward 0.
        group_ids: [B] int64, equal for responses to the same prompt.

    Raises:
        ShapeError: ``group_ids`` is not int64 [B], or ``cluster_ids`` not int64 of its shape and on its device.
    """
    own, size = _cluster_and_group_sizes(cluster_ids, group_ids)
    return torch.where(Partition(group_ids).max(own) > 1, own / size, 0.0).float()


def majority_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: 1 for answers of the group's largest cluster (or clusters, at a tie), else 0.

    Arguments and errors as in ``semantic_rewards``. Source: test-time reinforcement,
    arXiv 2504.16084; SPINE, arXiv 2511.17938, builds on it.
    """
    own, _ = _cluster_and_group_sizes(cluster_ids, group_ids)
    return ((cluster_ids >= 0) & (own == Partition(group_ids).max(own))).float()


def _cluster_and_group_sizes(cluster_ids: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B] int64: size of the response's cluster (0 without an answer) and of its group."""
    if not (isinstance(group_ids, Tensor) and group_ids.dim() == 1 and group_ids.dtype == torch.int64):
        raise ShapeError(f"group_ids: expected int64 [B], got {describe(group_ids)}")
    require_tensor("cluster_ids", cluster_ids, tuple(group_ids.shape), (torch.int64,), group_ids)
    groups, clusters = Partition(group_ids), Partition(cluster_ids)  # their numbers are below B, whatever the ids
    own = Partition(groups.index * group_ids.numel() + clusters.index).counts
    return torch.where(cluster_ids >= 0, own, 0), groups.counts
