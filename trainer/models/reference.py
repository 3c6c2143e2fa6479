"""The reference policy of a KL penalty: the initial policy, or a moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .policy import Policy
from .sharding import local_tensor

CHUNK = 1 << 20
"""Weights that are exchanged at once. Their buffer is allocated before the first exchange, so that
being out of memory cannot leave two policies mixed."""


class Reference:
    """Trained weights of an earlier policy. ``follow`` sets them to keep * reference + (1 - keep) *
    policy; keep = 1 leaves them.
    """

    def __init__(self, policy: Policy, keep: float) -> None:
        self.policy, self.keep = policy, keep
        self.weights = [p.detach().clone() for p in policy.trainable()]
        self._buffer = torch.empty(CHUNK, device=policy.device)

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
            ours, theirs = (local_tensor(tensor).view(-1).split(CHUNK) for tensor in (weight, parameter))
            for a, b in zip(ours, theirs, strict=True):
                kept = self._buffer[: len(a)].copy_(a)
                a.copy_(b)
                b.copy_(kept)

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the present policy."""
        if self.keep < 1:
            for weight, parameter in zip(self.weights, self.policy.trainable(), strict=True):
                local_tensor(weight).lerp_(local_tensor(parameter), 1 - self.keep)
