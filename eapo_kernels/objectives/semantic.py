"""Rewards without labels: how many of a group's answers mean the same. Which ones do is for the caller to say."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import require_tensor
from .grouping import Partition


def semantic_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: the share of the group's answers in the response's own cluster (EMPO, arXiv 2504.05812).

    A group in which every answer differs from all others (the semantic entropy is log G) gets zeros.

    Args:
        cluster_ids: [B] int64, equal for answers of a group that mean the same; negative: no answer, reward 0.
        group_ids: [B] int64.
    """
    own, size = _sizes(cluster_ids, group_ids)
    answers = Partition(group_ids)
    agreement = answers.max(torch.where(cluster_ids >= 0, own, 0.0))
    return torch.where((cluster_ids >= 0) & (agreement > 1), own / size, 0.0).float()


def majority_rewards(cluster_ids: Tensor, group_ids: Tensor) -> Tensor:
    """[B] fp32: 1 for answers of the group's largest cluster, else 0; arguments as in ``semantic_rewards``.

    Test-time reinforcement (arXiv 2504.16084; SPINE, arXiv 2511.17938, builds on it). Clusters of equal size all win.
    """
    own, _ = _sizes(cluster_ids, group_ids)
    own = torch.where(cluster_ids >= 0, own, 0.0)
    return ((cluster_ids >= 0) & (own == Partition(group_ids).max(own))).float()


def _sizes(cluster_ids: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B] fp64: size of the response's cluster and of its group."""
    require_tensor("cluster_ids", cluster_ids, tuple(group_ids.shape), (torch.int64,), group_ids)
    groups = Partition(group_ids)
    span = (cluster_ids.clamp_min(-1) + 1).amax() + 1 if cluster_ids.numel() else 1
    return Partition(groups.index * span + cluster_ids.clamp_min(-1) + 1).counts, groups.counts
