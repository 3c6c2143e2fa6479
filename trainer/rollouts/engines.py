"""The engine that ``rollout.engine`` names."""

from __future__ import annotations

from ..config import Config
from ..models.policy import Policy
from .engine import RolloutEngine
from .transformers_engine import TransformersEngine


def make_engine(config: Config, policy: Policy) -> RolloutEngine:
    """An engine with ``policy``'s weights.

    Raises:
        EapoError: one that cannot run here; see ``VllmEngine``.
    """
    if config.rollout.engine == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(policy, config.rollout, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    return TransformersEngine(policy, config.rollout.batch)
