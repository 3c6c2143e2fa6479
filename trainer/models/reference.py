"""The reference policy of a KL penalty: the initial policy, or a moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .policy import Policy
from .sharding import local_tensor


class Reference:
    """Trained weights of an earlier policy. ``follow`` sets them to keep * reference + (1 - keep) *
    policy; keep = 1 leaves them.
    """

    def __init__(self, policy: Policy, keep: float) -> None:
        self.policy, self.keep = policy, keep
        self.weights = [p.detach().clone() for p in policy.trainable()]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context the policy has the reference's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the weights in place: FSDP2 gathers from the memory that a sharded parameter is
        a view of.
        """
        for weight, parameter in zip(self.weights, self.policy.trainable(), strict=True):
            ours, theirs = local_tensor(weight), local_tensor(parameter)
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the present policy."""
        if self.keep < 1:
            for weight, parameter in zip(self.weights, self.policy.trainable(), strict=True):
                local_tensor(weight).lerp_(local_tensor(parameter), 1 - self.keep)
