"""Warnings about settings that are allowed and probably not intended, one line each."""

from __future__ import annotations

import math

from torch import Tensor

from ..hooks import ReplayRollouts
from .tree import Config


def advice(config: Config) -> list[str]:
    """Warnings to print before the first step."""
    rollout, optim, method, hook = config.rollout, config.optim, config.method(), config.loss.hook()
    found = []
    if method.name == "kl_cov" and optim.minibatches == optim.epochs == 1:
        found.append(
            "kl_cov has no effect while the ratio is 1, in the first update: set optim.minibatches or optim.epochs > 1"
        )
    highest = (rollout.responses - 1) / math.sqrt(rollout.responses)  # group_norm advantage of a single different reward
    if isinstance(hook, ReplayRollouts) and method.config.advantage == "group_norm" and highest <= hook.good_above:
        found.append(
            f"{method.name} replays nothing: no advantage in a group of {rollout.responses} exceeds {highest:.2g}, "
            f"and loss.good_above is {hook.good_above:g}"
        )
    if method.config.importance_cap is None:
        cap = "; loss.importance_cap (2, say) corrects for it"
        if rollout.sampling(rollout.responses, seed=0).filtered and not rollout.record_support:
            left = "the loss is over the whole vocabulary, and top_p, top_k or min_p leave a part of it"
            found.append(f"rollout.record_support is False: {left}{cap}")
        dtype = rollout.vllm.dtype
        if rollout.engine == "vllm" and dtype not in ("auto", config.model.dtype):
            found.append(f"rollout.vllm.dtype is {dtype} and model.dtype {config.model.dtype}: log-probs differ{cap}")
    return found


def advice_on_rewards(config: Config, rewards: Tensor) -> list[str]:
    """Warnings to print after the first step. rewards: [B], those of its completions."""
    method = config.method()
    bound = getattr(method.token_weighting, "correct_above", None)
    if bound is None or not len(rewards) or rewards.max() > bound:
        return []
    return [
        f"{method.name} counts completions with a reward above {bound:g} as correct, and the highest reward of the first step "
        f"is {rewards.max().item():.3g}: scale rewards.weights or set loss.correct_above"
    ]
