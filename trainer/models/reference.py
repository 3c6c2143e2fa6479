"""The policy that a KL penalty pulls towards: the first one, or one that follows at a distance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .policy import Policy
from .sharding import local


class Reference:
    """Trained weights of an earlier policy. ``keep``: the share of them that stays at every ``follow``; 1 never moves."""

    def __init__(self, policy: Policy, keep: float) -> None:
        self.policy, self.keep = policy, keep
        self.weights = [p.detach().clone() for p in policy.trainable()]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the policy has the reference's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """In place: a sharded parameter is a view of the memory that its gathering reads."""
        for weight, parameter in zip(self.weights, self.policy.trainable(), strict=True):
            ours, theirs = local(weight), local(parameter)
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the policy as it is now."""
        if self.keep < 1:
            for weight, parameter in zip(self.weights, self.policy.trainable(), strict=True):
                local(weight).lerp_(local(parameter), 1 - self.keep)
