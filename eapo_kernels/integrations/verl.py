"""verl 0.9: policy loss ``eapo``, advantage estimator ``eapo``, and the op behind ``FusedLinearForPPO``'s contract.

This module is the entry point ``eapo_kernels`` of the group ``verl.plugins``: where both packages are installed, ``import
verl`` imports it in every process, which adds the two names to verl's tables and changes nothing else.

    actor_rollout_ref.actor.policy_loss.loss_mode=eapo   # the clipped surrogate of E10; any homogeneous loss does as well
    algorithm.adv_estimator=eapo                         # GRPO's advantages, positives times the weight, once
    trainer.v1.trainer_mode=eapo_sync                    # measures H_k; needs VERL_USE_EXTERNAL_MODULES (verl_trainer.py)

The estimator runs in the trainer's own process on the whole batch, so the weight is one number for all ranks and micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe, require_choice
from ..errors import EapoError, ShapeError, require
from ..objectives.surrogates import Clip, log_ratio, ppo_clip
from ..ops.token_stats import token_stats
from ..types import Options
from .versions import require_version
from .weight import AdvantageWeight

require_version("verl", "0.9", "0.10")

from verl.trainer.ppo.core_algos import (  # noqa: E402
    agg_loss,
    get_adv_estimator_fn,
    register_adv_est,
    register_policy_loss,
)

HOMOGENEOUS_LOSSES = ("eapo", "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "cispo")
"""verl's losses with loss(w A) = w loss(A): those that the weighted advantages may be given to. clip_cov and kl_cov select
tokens by the advantage, dro has a term without it, bypass_mode has no entropy of the policy."""

_ACTIVE: list[AdvantageWeight] = []


def activate(weight: AdvantageWeight) -> None:
    """Make this the weight that the estimator ``eapo`` applies in this process. The trainers of verl_trainer.py call it."""
    require(isinstance(weight, AdvantageWeight), "weight", "an AdvantageWeight", weight)
    _ACTIVE[:] = [weight]


def deactivate() -> None:
    """Forget the active weight."""
    _ACTIVE.clear()


@register_adv_est("eapo")
def eapo_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """Another estimator's advantages with the positive ones weighted (docs/math.md E10).

    Args:
        token_level_rewards, response_mask: [B, T].
        index: [B], the prompt of each response.
        config: verl's ``algorithm`` section; ``eapo.advantage`` names the estimator (default "grpo").
        others: what else verl passes; handed on.

    Returns:
        (advantages [B, T], returns [B, T] as the estimator gave them).

    Raises:
        EapoError: no trainer has measured the entropy in this process, or ``eapo.advantage`` names "eapo".
    """
    if not _ACTIVE:
        raise EapoError(
            "algorithm.adv_estimator=eapo: expected a trainer that measures the policy's entropy in this process, got none: "
            "set trainer.v1.trainer_mode=eapo_sync and VERL_USE_EXTERNAL_MODULES=eapo_kernels.integrations.verl_trainer"
        )
    section = {} if config is None else config.get("eapo", None) or {}
    name = section.get("advantage", "grpo")
    require(name != "eapo", "algorithm.eapo.advantage", "another estimator's name", repr(name))
    given: dict[str, Any] = {"token_level_rewards": token_level_rewards, "response_mask": response_mask, "config": config}
    if index is not None:
        given["index"] = index
    if name == "grpo":
        given["norm_adv_by_std_in_grpo"] = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    advantages, returns = get_adv_estimator_fn(name)(**given, **others)
    return _ACTIVE[0].apply(advantages), returns


@register_policy_loss("eapo")
def eapo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """E10's clipped surrogate, -min(rho A, clip(rho, 1 - clip_ratio_low, 1 + clip_ratio_high) A), without verl's dual clip.

    The weight is not applied here: the advantages bring it.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T].
        loss_agg_mode: verl's reductions.
        config: verl's ActorConfig.
        rollout_is_weights: [B, T] or None, factor per token.

    Returns:
        (0-dim loss, metrics as of verl's vanilla loss).

    Raises:
        EapoError: no config.
    """
    require(config is not None, "config", "verl's ActorConfig", None)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    mask = response_mask.bool()
    difference = torch.where(mask, log_ratio(log_prob, old_log_prob), 0.0)
    term, clipped = ppo_clip(log_prob, difference, advantages, Clip(low, high))
    per_token = torch.where(mask, -term, 0.0)
    if rollout_is_weights is not None:
        per_token = per_token * rollout_is_weights
    loss = agg_loss(loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    tokens = mask.sum().clamp_min(1)
    return loss, {
        "actor/pg_clipfrac": ((clipped & mask).sum() / tokens).item(),
        "actor/ppo_kl": (-difference.detach().sum() / tokens).item(),
        "actor/pg_clipfrac_lower": 0.0,
    }


class FusedLinearForPPO(nn.Module):
    """This package's op with the calling convention of verl's FusedLinearForPPO (``use_fused_kernels``).

    Differences: the entropy is fp32 whatever the hidden states are, and memory is bounded in bytes, not by ``chunk_size``. The
    contract has no mask, so prompts, and without ``use_remove_padding`` padding, cost what responses cost, as they do in verl.
    """

    options: Options | None = None
    backend: str = "auto"

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        """
        Args:
            chunk_size: verl's; not used.
            impl_backend: verl's "torch" or "liger"; both mean this op.

        Raises:
            EapoError: another backend.
        """
        super().__init__()
        require_choice("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: [..., D].
            vocab_weights: [V, D].
            input_ids: [...] integer, the token that follows each position.
            temperature: a number or [...].

        Returns:
            (log_probs [...] fp32, entropy [...] fp32), both differentiable.

        Raises:
            ShapeError: shapes do not fit.
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ShapeError(f"input_ids: expected integers {list(hidden_states.shape[:-1])}, got {describe(input_ids)}")
        stats = token_stats(
            hidden_states, vocab_weights, input_ids.long(), inv_temperature=1.0 / temperature, backend=self.backend,
            options=self.options,
        )  # fmt: skip
        assert stats.entropy is not None
        return stats.logp, stats.entropy


def install_fused_op() -> None:
    """Put ``FusedLinearForPPO`` in the place of verl's, for all model families, in this process.

    verl looks the class up at every forward when ``actor_rollout_ref.model.use_fused_kernels=True`` and ``impl_backend`` is
    "torch" or "liger". In Ray's workers: VERL_USE_EXTERNAL_MODULES=eapo_kernels.integrations.verl_fused.
    """
    from verl.utils.experimental import torch_functional

    torch_functional.FusedLinearForPPO = FusedLinearForPPO
