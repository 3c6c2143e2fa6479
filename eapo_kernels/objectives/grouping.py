"""Sums over groups of responses, without a host synchronisation and independent of the order of the addition's threads."""

from __future__ import annotations

import torch
from torch import Tensor

_TIE = torch.finfo(torch.float32).eps
"""A reward this close to its mean, relative to the group's largest magnitude, counts as equal to it: the rewards of a group
are fp32 numbers whose mean need not be representable."""


class Groups:
    """Group means, spreads and sizes of rewards [B] with group numbers [B] int64 (any values)."""

    def __init__(self, rewards: Tensor, group_ids: Tensor | None) -> None:
        """``group_ids`` None: one group of all."""
        self.rewards = rewards.double()
        n = rewards.numel()
        if group_ids is None:
            self._index = torch.zeros(n, dtype=torch.int64, device=rewards.device)
        else:
            ordered, order = torch.sort(group_ids)
            first = torch.ones_like(ordered)
            if n > 1:
                first[1:] = (ordered[1:] != ordered[:-1]).to(first.dtype)
            self._index = torch.empty_like(ordered).scatter_(0, order, first.cumsum(0) - 1)
        self._size = max(n, 1)
        self.counts = self._sum(torch.ones_like(self.rewards))
        self.means = self._sum(self.rewards) / self.counts

    def _sum(self, values: Tensor) -> Tensor:
        """[B]: the sum over the member's own group."""
        total = values.new_zeros(self._size).index_add_(0, self._index, values)
        return total[self._index]

    def _extreme(self, values: Tensor, reduce: str) -> Tensor:
        out = values.new_zeros(self._size).scatter_reduce_(0, self._index, values, reduce, include_self=False)
        return out[self._index]

    def deviations(self) -> Tensor:
        """[B] r - mean of the group; exact zero for a tie with the mean (and so for a group of one)."""
        margin = self.rewards - self.means
        return torch.where(margin.abs() <= self.tie_width(), torch.zeros_like(margin), margin)

    def tie_width(self) -> Tensor:
        """[B] >= 0: deviations up to this size are rounding."""
        return _TIE * self._extreme(self.rewards.abs(), "amax")

    def unbiased_std(self) -> Tensor:
        """[B] standard deviation of the group with n - 1; zero where the group has one member or no spread."""
        squares = self._sum(self.deviations().square())
        return (squares / (self.counts - 1).clamp_min(1)).sqrt()
