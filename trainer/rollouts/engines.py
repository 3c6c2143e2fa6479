"""What an engine that samples answers must offer, and the engine that ``rollout.engine`` names.

An engine may run in this process or on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..config import Config
from ..models.policy import Policy
from ..records import Rollouts, Sampling, Tick
from .transformers_engine import TransformersEngine


class RolloutEngine(Protocol):
    """Samples answers from the latest weights it was given."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts: ...

    def sync_weights(self, policy: Policy) -> None:
        """Make ``policy``'s present weights the ones that ``generate`` uses."""

    def close(self) -> None:
        """Give back what the engine holds; it generates nothing afterwards."""


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine with ``policy``'s weights.

    Raises:
        EapoError: one that cannot run here; see ``VllmEngine``.
    """
    if config.rollout.engine == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(policy, config.rollout, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    return TransformersEngine(policy, config.rollout.batch)
