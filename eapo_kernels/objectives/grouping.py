"""Statistics within classes of tokens or responses, without host synchronization.

Sums are in fp64, so that the order of addition does not show in fp32 results.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TIE = torch.finfo(torch.float32).eps
"""A reward this close to its mean, relative to the group's largest magnitude, counts as equal to
it: the rewards of a group are fp32 numbers whose mean need not be representable."""


class Partition:
    """Statistics within classes. Results are [N] fp64: each member holds the value of its class.

    Attributes:
        valid: [N] bool, the members that count; results at the others are undefined.
        index: [N] int64 in [0, N), the number of the member's class, in the order of the keys.
        counts: [N] fp64, size of the member's class.
    """

    def __init__(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """keys: [N] int64 below int64's maximum; equal keys form a class. valid None: all."""
        self.valid = torch.ones_like(keys, dtype=torch.bool) if valid is None else valid
        ordered, order = torch.sort(torch.where(self.valid, keys, torch.iinfo(torch.int64).max))
        first = torch.ones_like(ordered)
        first[1:] = (ordered[1:] != ordered[:-1]).to(first.dtype)
        self.index = torch.empty_like(ordered).scatter_(0, order, first.cumsum(0) - 1)
        self._size = max(keys.numel(), 1)
        self.counts = self.sum(torch.ones_like(keys, dtype=torch.float64))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` [N] over the class."""
        chosen = torch.where(self.valid, values.double(), 0.0)
        return chosen.new_zeros(self._size).index_add_(0, self.index, chosen)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the class."""
        return self.sum(values) / self.counts.clamp_min(1)

    def max(self, values: Tensor) -> Tensor:
        """The largest of ``values`` in the class."""
        chosen = torch.where(self.valid, values.double(), float("-inf"))
        return chosen.new_zeros(self._size).scatter_reduce_(0, self.index, chosen, "amax", include_self=False)[self.index]

    def min(self, values: Tensor) -> Tensor:
        """The smallest of ``values`` in the class."""
        return -self.max(-values)

    def rank(self, values: Tensor) -> Tensor:
        """[N] int64: members of the class before this one by ``values``; ties keep order."""
        order, first = self._sorted(values)
        places = torch.arange(order.numel(), device=order.device)
        return torch.empty_like(order).scatter_(0, order, places) - first

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """The ``q``-quantile of ``values`` in the class, interpolated as torch.quantile."""
        order, first = self._sorted(values)
        ordered = values.double()[order]
        place = q * (self.counts - 1).clamp_min(0)
        below = ordered[first + place.floor().long()]
        return below + (ordered[first + place.ceil().long()] - below) * (place - place.floor())

    def mean_of_classes(self, values: Tensor) -> Tensor:
        """0-dim: mean over the classes of ``values`` constant within a class; 0 without any."""
        share = torch.where(self.valid, 1 / self.counts.clamp_min(1), 0.0)
        return (torch.where(self.valid, values.double(), 0.0) * share).sum() / share.sum().clamp_min(1)

    def following(self, values: Tensor, fill: float) -> Tensor:
        """The next class's value, for values constant in a class; ``fill`` after the last."""
        table = torch.full((self._size + 1,), fill, dtype=torch.float64, device=values.device)
        place = torch.where(self.valid, self.index, self._size)
        table.scatter_(0, place, torch.where(self.valid, values.double(), fill))
        return table[self.index + 1]

    def _sorted(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The order by class, then by value; and [N] its index of the class's first member."""
        by_value = values.argsort(stable=True)
        order = by_value[self.index[by_value].argsort(stable=True)]
        sizes = torch.zeros_like(self.index).index_add_(0, self.index, torch.ones_like(self.index))
        return order, (sizes.cumsum(0) - sizes)[self.index]


class Groups:
    """Group means, spreads and sizes of rewards [B] with group numbers [B] int64 (any values)."""

    def __init__(self, rewards: Tensor, group_ids: Tensor | None) -> None:
        """``group_ids`` None: one group of all."""
        self.rewards = rewards.double()
        one = torch.zeros(rewards.shape, dtype=torch.int64, device=rewards.device)
        self.members = Partition(one if group_ids is None else group_ids)
        self.counts = self.members.counts
        self.means = self.members.mean(self.rewards)

    def deviations(self) -> Tensor:
        """[B] r - mean of the group; exactly 0 at a tie with the mean, and for a group of one."""
        margin = self.rewards - self.means
        return torch.where(margin.abs() <= self.tie_width(), torch.zeros_like(margin), margin)

    def tie_width(self) -> Tensor:
        """[B] >= 0: deviations up to this size are rounding."""
        return _TIE * self.members.max(self.rewards.abs())

    def unbiased_std(self) -> Tensor:
        """[B] standard deviation of the group with n - 1; 0 for one member or equal rewards."""
        squares = self.members.sum(self.deviations().square())
        return (squares / (self.counts - 1).clamp_min(1)).sqrt()
