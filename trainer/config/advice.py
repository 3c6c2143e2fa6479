"""Settings that are allowed and probably not meant: one line each, for the console."""

from __future__ import annotations

import math

from torch import Tensor

from ..hooks import ReplayRollouts
from .tree import Config


def advice(config: Config) -> list[str]:
    """What to say before the first step."""
    rollout, optim, method, hook = config.rollout, config.optim, config.method(), config.loss.hook()
    found = []
    if method.name == "kl_cov" and optim.minibatches == optim.epochs == 1:
        found.append(
            "kl_cov acts where the ratio is not 1, never in a step's first update: set optim.minibatches or optim.epochs > 1"
        )
    highest = (rollout.responses - 1) / math.sqrt(rollout.responses)  # of group_norm: one answer apart from all others
    if isinstance(hook, ReplayRollouts) and method.config.advantage == "group_norm" and highest <= hook.good_above:
        found.append(
            f"{method.name} replays nothing: no advantage in a group of {rollout.responses} exceeds {highest:.2g}, "
            f"and loss.good_above is {hook.good_above:g}"
        )
    if method.config.importance_cap is None:
        cap = "; loss.importance_cap (2, say) corrects for it"
        if rollout.top_p < 1:
            found.append(
                f"rollout.top_p is {rollout.top_p:g}: answers come from another distribution than the loss assumes{cap}"
            )
        dtype = rollout.vllm.dtype
        if rollout.engine == "vllm" and dtype not in ("auto", config.model.dtype):
            found.append(f"rollout.vllm.dtype is {dtype} and model.dtype {config.model.dtype}: log-probs differ{cap}")
    return found


def advice_on_rewards(config: Config, rewards: Tensor) -> list[str]:
    """What to say after the first step. rewards: [B], those of its answers."""
    method = config.method()
    bound = getattr(method.token_weighting, "correct_above", None)
    if bound is None or not len(rewards) or rewards.max() > bound:
        return []
    return [
        f"{method.name} takes answers with a reward above {bound:g} for correct, and the best of the first step has "
        f"{rewards.max().item():.3g}: scale rewards.weights or set loss.correct_above"
    ]
