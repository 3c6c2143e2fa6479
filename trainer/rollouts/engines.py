"""The interface of an engine that samples completions, and the choice by ``rollout.engine``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..config import Config
from ..models.policy import Policy
from ..records import Rollouts, Sampling, Tick
from .transformers_engine import TransformersEngine


class RolloutEngine(Protocol):
    """Samples completions from the weights of the latest ``sync_weights``."""

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, tick: Tick) -> Rollouts: ...

    def sync_weights(self, policy: Policy) -> None:
        """Use ``policy``'s present weights from now on."""

    def close(self) -> None:
        """Free the resources of the engine. It cannot generate afterwards."""


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine with ``policy``'s weights.

    Raises:
        TrainerError: it cannot run here; see ``VllmEngine``.
    """
    if config.rollout.engine == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(policy, config.rollout, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    return TransformersEngine(policy, config.rollout.batch)
