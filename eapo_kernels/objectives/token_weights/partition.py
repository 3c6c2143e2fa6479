"""Order statistics within classes and statistics over classes, for token weightings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grouping import Partition


class OrderedPartition(Partition):
    """A ``Partition`` with order statistics; arguments and results as there."""

    def min(self, values: Tensor) -> Tensor:
        """The smallest of ``values`` [N] in the class."""
        return -self.max(-values)

    def rank(self, values: Tensor) -> Tensor:
        """[N] int64: members of the class before this one by ``values``; ties keep their order."""
        order = self._order(values)
        places = torch.arange(order.numel(), device=order.device)
        return torch.empty_like(order).scatter_(0, order, places) - self.index

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """The ``q``-quantile of ``values`` [N] in the class, interpolated as ``torch.quantile``."""
        ordered = values.double()[self._order(values)]
        place = q * (self.counts - 1).double()
        below = ordered[self.index + place.floor().long()]
        return below + (ordered[self.index + place.ceil().long()] - below) * (place - place.floor())

    def mean_of_classes(self, values: Tensor) -> Tensor:
        """0-dim: mean over the classes of ``values`` constant within a class; 0 without any."""
        share = torch.where(self.valid, 1 / self.counts.double(), 0.0)
        return (torch.where(self.valid, values.double(), 0.0) * share).sum() / share.sum().clamp_min(1)

    def following(self, values: Tensor, fill: float) -> Tensor:
        """The next class's value, for ``values`` constant in a class; ``fill`` after the last."""
        table = torch.full((self._size + 1,), fill, dtype=torch.float64, device=values.device)
        place = torch.where(self.valid, self.index, self._size)
        table.scatter_(0, place, torch.where(self.valid, values.double(), fill))
        return table[self.index + self.counts]

    def _order(self, values: Tensor) -> Tensor:
        """The order by class, then by value; ``index`` is the place of the class's first member."""
        by_value = values.argsort(stable=True)
        return by_value[self.index[by_value].argsort(stable=True)]
