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
        order, first = self._sorted(values)
        places = torch.arange(order.numel(), device=order.device)
        return torch.empty_like(order).scatter_(0, order, places) - first

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """The ``q``-quantile of ``values`` [N] in the class, interpolated as ``torch.quantile``."""
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
        """The next class's value, for ``values`` constant in a class; ``fill`` after the last."""
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
