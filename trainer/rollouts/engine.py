"""What an engine that samples answers must offer, and the record it returns.

An engine may run in this process or on another machine; the loop knows only this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ..models.policy import Policy

Tick = Callable[[int, int], None]
"""Called with (done, total) while work goes on; may raise ``Interrupted``."""


def derive_seed(*parts: int) -> int:
    """A seed for one purpose, from the run's seed and what tells the purposes apart: no generator state to keep."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``seed`` decides every random number, so a call is a function of its arguments and the weights."""

    responses: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Rollouts:
    """Sampled answers; those to prompt ``p`` are ``p * responses`` to ``(p + 1) * responses - 1``. Ragged: no padding.

    Attributes:
        prompt_ids: B token lists, the prompt of each answer.
        completion_ids: B non-empty token lists; the end-of-sequence token is the last one where the answer ended.
        logp: B [length] fp32 CPU, log-prob of each token under the distribution it was drawn from (temperature and
            top-p applied, nats), as the engine computed it.
        truncated: B flags, True where max_new_tokens came before an end-of-sequence token.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logp: list[Tensor]
    truncated: list[bool]

    def chosen(self, indices: Sequence[int]) -> Rollouts:
        """Some of the answers, in the order given."""
        return Rollouts(
            [self.prompt_ids[i] for i in indices],
            [self.completion_ids[i] for i in indices],
            [self.logp[i] for i in indices],
            [self.truncated[i] for i in indices],
        )

    def joined(self, other: Rollouts) -> Rollouts:
        """These answers and then those."""
        return Rollouts(
            self.prompt_ids + other.prompt_ids,
            self.completion_ids + other.completion_ids,
            self.logp + other.logp,
            self.truncated + other.truncated,
        )


class RolloutEngine(Protocol):
    """Samples answers from the latest weights it was given."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts: ...

    def sync_weights(self, policy: Policy) -> None:
        """Make ``policy``'s present weights the ones that ``generate`` uses."""

    def close(self) -> None:
        """Give back what the engine holds; it generates nothing afterwards."""
