"""Statistics within groups of responses or tokens, without host synchronization.

Sums are in fp64, so that the order of addition does not change an fp32 result noticeably.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6
_TIE, _TIE_FP64 = torch.finfo(torch.float32).eps, 2.0**-48
"""The mean of rewards need not be representable. A reward equals the mean of its group if they differ by
at most this share of the group's largest magnitude; fp64 rewards keep the order of 1e9 + i."""


class Partition:
    """Statistics within classes. Those of values are [N] fp64: each member holds the value of its class.

    Attributes:
        index: [N] int64 in [0, N), the number of members whose key is smaller; one per class, in
            the order of the keys.
        counts: [N] int64, size of the member's class.
    """

    def __init__(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """keys: [N] int64 below int64's maximum; equal keys form a class. valid: [N] bool, or None: all."""
        self._only, self._size = valid, max(keys.numel(), 1)
        keys = (keys if valid is None else torch.where(valid, keys, torch.iinfo(torch.int64).max)).contiguous()
        ordered = keys.sort().values
        self.index = torch.searchsorted(ordered, keys)
        self.counts = torch.searchsorted(ordered, keys, right=True) - self.index

    @property
    def valid(self) -> Tensor:
        """[N] bool, the members that count; results of the others are undefined."""
        return torch.ones_like(self.index, dtype=torch.bool) if self._only is None else self._only

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` [N] over the class."""
        chosen = values.double() if self._only is None else torch.where(self._only, values.double(), 0.0)
        return chosen.new_zeros(self._size).index_add_(0, self.index, chosen).gather(0, self.index)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [N] over the class."""
        return self.sum(values) / self.counts

    def max(self, values: Tensor) -> Tensor:
        """The largest of ``values`` [N] in the class."""
        chosen = values.double() if self._only is None else torch.where(self._only, values.double(), float("-inf"))
        return chosen.new_full((self._size,), -torch.inf).scatter_reduce_(0, self.index, chosen, "amax").gather(0, self.index)


class Groups:
    """Statistics, [B] fp64, of rewards [B] in groups of equal ``group_ids`` (None: one group).

    margins: r - mean of the group. tie_width: margins up to this size are rounding.
    """

    def __init__(self, rewards: Tensor, group_ids: Tensor | None) -> None:
        self.rewards = rewards.double()
        self.members = Partition(torch.zeros_like(rewards, dtype=torch.int64) if group_ids is None else group_ids)
        self.margins = self.rewards - self.members.mean(self.rewards)
        self.tie_width = (_TIE_FP64 if rewards.dtype is torch.float64 else _TIE) * self.members.max(self.rewards.abs())

    def deviations(self) -> Tensor:
        """[B] r - mean of the group; exactly 0 at a tie with the mean, and for a group of one."""
        return self.margins.masked_fill(self.margins.abs() <= self.tie_width, 0.0)

    def normalised(self) -> Tensor:
        """[B] deviation / (std + 1e-6) with the unbiased std of the group."""
        deviations = self.deviations()
        variance = self.members.sum(deviations * deviations) / (self.members.counts - 1).clamp_min(1)
        return deviations / (variance.sqrt() + _EPS)
