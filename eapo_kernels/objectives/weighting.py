"""The reward-mean sign split and the weights of its two sides (docs/math.md E9, E10). Weights never carry gradient."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .grouping import Groups


class Split(NamedTuple):
    """The value a response is compared with. A response is positive when value > threshold (strictly: a tie is not).

    Attributes:
        values: [B] fp32.
        thresholds: [B] fp32.
    """

    values: Tensor
    thresholds: Tensor

    def positive(self) -> Tensor:
        """[B] bool."""
        return self.values > self.thresholds


def by_group(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """Against the reward mean of the response's group."""
    assert rewards is not None
    groups = Groups(rewards, group_ids)
    return Split(rewards.float(), (groups.means + groups.tie_width()).float())


def by_batch(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """Against the reward mean of the whole batch."""
    assert rewards is not None
    groups = Groups(rewards, None)
    return Split(rewards.float(), (groups.means + groups.tie_width()).float())


def by_advantage(rewards: Tensor | None, group_ids: Tensor | None, advantages: Tensor) -> Split:
    """By the advantage's own sign."""
    return Split(advantages, torch.zeros_like(advantages))


SPLITS = MappingProxyType({"group": by_group, "batch": by_batch, "advantage": by_advantage})
