"""Advantages of responses and their split into positive and negative: [B], without gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import EapoError, may_read
from .grouping import Groups

Advantage = Callable[[Tensor, Tensor], Tensor]
"""(rewards [B], group_ids [B]) -> advantages [B] fp32: a name in ``ADVANTAGES``, or a function."""


def group_norm(rewards: Tensor, group_ids: Tensor, groups: Groups | None = None) -> Tensor:
    """(r - mean) / (unbiased std + 1e-6) of the group; 0 if all are equal (GRPO, 2402.03300)."""
    return (groups or Groups(rewards, group_ids)).normalised().float()


def group_mean(rewards: Tensor, group_ids: Tensor, groups: Groups | None = None) -> Tensor:
    """r - mean of the group (Dr. GRPO, arXiv 2503.20783)."""
    return (groups or Groups(rewards, group_ids)).deviations().float()


def sign(rewards: Tensor, group_ids: Tensor, groups: Groups | None = None) -> Tensor:
    """+1 above the group's mean, -1 below, 0 at it."""
    return (groups or Groups(rewards, group_ids)).deviations().sign().float()


def batch_norm(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) over all responses of the batch."""
    return Groups(rewards, None).normalised().float()


def binary(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """+1 for a correct response (r = 1), -1 for a wrong one (r = 0) (arXiv 2506.01347).

    Raises EapoError for another reward, where ``may_read`` allows the check.
    """
    if may_read(rewards) and bool((graded := (rewards != 0) & (rewards != 1)).any()):
        expected = "0 or 1 with advantage 'binary' (use 'sign' for graded rewards)"
        raise EapoError(f"rewards: expected {expected}, got {rewards[graded][0].item():g}")
    return torch.where(rewards > 0.5, 1.0, -1.0).float()


ADVANTAGES: MappingProxyType[str, Advantage] = MappingProxyType(
    {f.__name__: f for f in (group_norm, group_mean, sign, batch_norm, binary)}
)

OF_GROUPS = (group_norm, group_mean, sign)
"""Advantages that read statistics of the groups, and take them if the split has computed them."""

SPLITS = ("group", "batch", "advantage")
"""A response is positive by its group's or the batch's reward mean, or by its advantage's sign."""


class Split(NamedTuple):
    """The sign split (E9, E10), both [B] fp32: a response is positive where value > threshold. The values are
    centred in fp64: rewards themselves may exceed fp32's integers."""

    values: Tensor
    thresholds: Tensor

    def positive(self) -> Tensor:
        """[B] bool."""
        return self.values > self.thresholds


def split_responses(advantages: Tensor, groups: Groups | None) -> Split:
    """The split by the mean of the groups, or without groups by the advantage's sign."""
    if groups is None:
        return Split(advantages, torch.zeros_like(advantages))
    return Split(groups.margins.float(), groups.tie_width.float())
