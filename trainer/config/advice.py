"""Warnings about settings that are allowed and probably not intended, one line each."""

from __future__ import annotations

from torch import Tensor

from . import Config

LOSS_ALONE = ("aepo", "aepo_agentic", "cure", "hapo", "spear", "t1")
"""Methods with rollouts of their own, which are not in this trainer."""


def advice(config: Config) -> list[str]:
    """Warnings to print before the first step."""
    rollout, optim, method = config.rollout, config.optim, config.method()
    found = []
    if method.name in LOSS_ALONE:
        found.append(f"{method.name}: only its loss is in this trainer, not its way to sample completions (docs/methods.md)")
    if method.name == "kl_cov" and optim.minibatches == optim.epochs == 1:
        found.append(
            "kl_cov has no effect while the ratio is 1, in the first update: set optim.minibatches or optim.epochs > 1"
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


def advice_on_zero_gradients(steps: int) -> list[str]:
    """Warnings after ``steps`` steps in a row whose gradient was zero; once, after five."""
    if steps != 5:
        return []
    return [
        "the gradient of five steps was 0, so nothing was learned: most often all completions of a prompt have the same "
        "reward. Look at samples.jsonl; with truncated near 1, rollout.max_new_tokens may be too small for an answer"
    ]


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
