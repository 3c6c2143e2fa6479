"""verl 0.9: loss ``eapo``, estimator ``eapo``, the ``eapo_*`` trainers, the op for fused kernels.

This module is the entry point ``eapo_kernels`` of the group ``verl.plugins``: ``import verl``
imports it in every process. That adds the loss and the estimator to verl's registries and changes
nothing else. The trainers and the op are requested by name: verl_trainer.py, verl_fused.py.

    actor_rollout_ref.actor.policy_loss.loss_mode=eapo  # or any of HOMOGENEOUS_LOSSES
    algorithm.adv_estimator=eapo                        # GRPO's advantages, positives weighted
    trainer.v1.trainer_mode=eapo_sync                   # measures H_k and updates the weight

verl computes advantages in the trainer's process on the whole batch. The weight is therefore one
number for all ranks and micro-batches of a step.

verl's batches carry no sampling mask: with top_p or top_k its losses are over the whole vocabulary.
"""

from __future__ import annotations

import copy
import functools
import types
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EapoError, ShapeError, describe, require, require_choice
from ..objectives.controllers import EntropyRatio
from ..objectives.surrogates import Clip, log_ratio, ppo_clip
from ..ops.token_stats import token_stats
from ..types import Options
from . import require_version
from .own_logits import LogitTransform, causal_lm, logit_transform
from .weight import AdvantageWeight

require_version("verl", ">=0.9,<0.10")

from verl.trainer.ppo.core_algos import (  # noqa: E402
    agg_loss,
    get_adv_estimator_fn,
    register_adv_est,
    register_policy_loss,
)

HOMOGENEOUS_LOSSES = ("eapo", "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "geo_mean", "cispo")
"""verl's losses with loss(w A) = w loss(A), which may take weighted advantages.

Not among them: clip_cov and kl_cov select tokens by the advantage, dro has a term without it, and
bypass_mode has no entropy of the policy."""

TRAINERS = ("sync", "colocate_async", "separate_async")
PREFIX = "eapo_"
_SETTINGS = ("kappa", "scale", "low", "high", "ema", "anchor_steps")
_active: AdvantageWeight | None = None


def activate(weight: AdvantageWeight | None) -> None:
    """Set the weight that the estimator ``eapo`` applies in this process; None: no weight."""
    global _active
    require(weight is None or isinstance(weight, AdvantageWeight), "weight", "an AdvantageWeight or None", weight)
    _active = weight


@register_adv_est("eapo")
def eapo_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """Another estimator's advantages, with the positive ones weighted (docs/math.md E10).

    Args:
        token_level_rewards, response_mask: [B, T].
        index: [B], the prompt of each response.
        config: verl's ``algorithm`` section; ``eapo.advantage`` names the other estimator (default
            "grpo").
        others: further arguments of verl, passed to the other estimator.

    Returns:
        (advantages [B, T], returns [B, T] of the other estimator).

    Raises:
        EapoError: no active weight in this process, or ``eapo.advantage`` names "eapo".
    """
    if _active is None:
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
    return _active.apply(advantages), returns


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
    """E10's clipped surrogate without verl's dual clip.

    -min(rho A, clip(rho, 1 - clip_ratio_low, 1 + clip_ratio_high) A) per token. The advantages
    already carry the weight.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T].
        loss_agg_mode: verl's reductions.
        config: verl's ActorConfig.
        rollout_is_weights: [B, T] or None, factor per token.

    Returns:
        (0-dim loss, the metrics of verl's vanilla loss).

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
    """This package's op with the calling convention of verl's FusedLinearForPPO.

    Differences: the entropy is fp32 for hidden states of any dtype, and memory is bounded in bytes,
    not by ``chunk_size``. The convention has no mask: prompts, and padding without
    ``use_remove_padding``, cost as much as responses, as in verl.
    """

    options: Options | None = None
    backend: str = "auto"

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        """
        Args:
            chunk_size: no effect.
            impl_backend: verl's "torch" or "liger"; both select this op.

        Raises:
            EapoError: another backend.
        """
        super().__init__()
        require_choice("impl_backend", impl_backend, ("torch", "liger"))

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
            EapoError: installed, and called by a model that verl has patched before.
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ShapeError(f"input_ids: expected integers {list(hidden_states.shape[:-1])}, got {describe(input_ids)}")
        stats = token_stats(
            hidden_states, vocab_weights, input_ids.long(), inv_temperature=1.0 / temperature, backend=self.backend,
            options=self.options, **self.head_options(hidden_states.dtype),
        )  # fmt: skip
        assert stats.entropy is not None
        return stats.logp, stats.entropy

    def head_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """bias, softcap and logit_scale as keywords of ``token_stats``: verl's call passes none."""
        return {}


class _ModelsOp(FusedLinearForPPO):
    """The op as installed: with the bias, soft-cap and scale of the head of the model that calls it."""

    def head_options(self, dtype: torch.dtype) -> dict[str, Any]:
        model = _calling.get()
        learned = None if model is None else vars(model).get(_LEARNED)
        if learned is None:
            raise EapoError(
                "use_fused_kernels: expected a model that verl patches after install_fused_op, which learns the head's bias, "
                "soft-cap and scale from it, got another (import verl_fused before the model is built)"
            )
        bias = model.lm_head.bias
        return {"bias": None if bias is None else bias.to(dtype), **learned._asdict()}


_LEARNED = "eapo_logit_transform"
_calling: ContextVar[Any] = ContextVar("_calling", default=None)
"""The model whose forward is running."""


def install_fused_op() -> None:
    """Replace verl's FusedLinearForPPO in this process, for all model families.

    verl looks the class up at every forward with ``actor_rollout_ref.model.use_fused_kernels=True``
    and ``impl_backend`` "torch" or "liger". It gives the op the head's weight only. What a model does to its
    logits beyond it is learned when verl patches its forward. In Ray workers, verl_fused.py calls
    this function.
    """
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental import torch_functional

    torch_functional.FusedLinearForPPO = _ModelsOp
    if not hasattr(monkey_patch.patch_forward_with_backends, _LEARNED):
        monkey_patch.patch_forward_with_backends = _learning(monkey_patch.patch_forward_with_backends)


def _learning(patch: Any) -> Any:
    """verl's ``patch_forward_with_backends``, which also learns the head of the model."""

    @functools.wraps(patch)
    def patched(model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None) -> None:
        if not (use_fused_kernels and fused_kernels_backend in ("torch", "liger")):
            patch(model, use_fused_kernels, fused_kernels_backend)
            return
        kind = type(model)
        before = getattr(kind.forward, _LEARNED, kind.forward)  # a model of this class may have been patched already
        early = before.__name__ in ("forward_with_torch_backend", "forward_with_triton_backend")
        require(not early, "install_fused_op", "a call before verl patches the first model", "one after it")
        learned = LogitTransform()  # verl's own forward of models with images applies the head alone
        if before.__name__ != "forward_with_normal_backend":
            model.forward = types.MethodType(before, model)
            try:
                learned = logit_transform(causal_lm(model))
            finally:
                del model.forward
        patch(model, use_fused_kernels, fused_kernels_backend)
        setattr(model, _LEARNED, learned)
        forward = kind.forward

        @functools.wraps(forward)
        def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
            token = _calling.set(self)
            try:
                return forward(self, *args, **kwargs)
            finally:
                _calling.reset(token)

        setattr(calling, _LEARNED, before)
        kind.forward = calling

    setattr(patched, _LEARNED, True)
    return patched


class EAPOMixin:
    """Place it before a V1 ``PPOTrainer`` in the bases of a class.

    The trainer measures H_k where verl computes the old log-probs: same batch, mask and
    temperature, no further forward. The controller is updated before the advantages are computed.
    Metrics: ``eapo/*``. The state is saved in ``global_step_N/eapo_state.json``.

    Attributes:
        eapo: AdvantageWeight, with the controller.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """
        Args:
            config: verl's; ``algorithm.eapo`` may hold kappa, scale, low, high, ema and advantage.

        Raises:
            EapoError: an estimator, loss or rollout correction that the weight does not support, or
                an unknown setting.
        """
        config = copy.deepcopy(config)
        # verl compares this name with "sync", so the trainer has to carry the name of its base.
        config.trainer.v1.trainer_mode = str(config.trainer.v1.trainer_mode).removeprefix(PREFIX)
        _check_config(config)
        section = config.algorithm.get("eapo", None) or {}
        settings: dict[str, Any] = {name: float(section[name]) for name in _SETTINGS if name in section}
        self.eapo = AdvantageWeight(EntropyRatio(**settings))
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's forward of the old policy; its entropies give the weight of the step."""
        batch = super()._compute_old_log_prob(batch, metrics=metrics)  # type: ignore[misc]
        from verl.trainer.ppo.v1 import trainer_base

        data = trainer_base.tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy", "response_mask"]
        )
        padded = data.to_padded_tensor()
        self.eapo.observe(padded["entropy"], padded["response_mask"])
        self.eapo.step()
        metrics.update({name: float(value) for name, value in self.eapo.metrics().items()})
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's; its estimator ``eapo`` applies the weight."""
        activate(self.eapo)
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]

    def _save_checkpoint(self) -> Any:
        """The controller first: verl's last write marks the checkpoint as the latest."""
        trainer: Any = self
        folder = Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        self.eapo.save(folder)
        return super()._save_checkpoint()  # type: ignore[misc]

    def _load_checkpoint(self) -> Any:
        result = super()._load_checkpoint()  # type: ignore[misc]
        trainer: Any = self
        settings = trainer.config.trainer
        if trainer.global_steps:
            resume_path = settings.resume_mode == "resume_path"
            latest = f"{settings.default_local_dir}/global_step_{trainer.global_steps}"
            self.eapo.load(settings.resume_from_path if resume_path else latest)
        return result


def _check_config(config: Any) -> None:
    estimator, loss = config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla")
    require(estimator == "eapo", "algorithm.adv_estimator", "'eapo' with an eapo_ trainer", repr(estimator))
    homogeneous = f"one of {', '.join(HOMOGENEOUS_LOSSES)} (positively homogeneous in the advantage)"
    require(loss in HOMOGENEOUS_LOSSES, "actor.policy_loss.loss_mode", homogeneous, repr(loss))
    correction = config.algorithm.get("rollout_correction", None) or {}
    name = "algorithm.rollout_correction.bypass_mode"
    require(not correction.get("bypass_mode", False), name, "False (the entropy comes from the old-policy forward)", True)
    known = (*_SETTINGS, "advantage")
    unknown = sorted(set(config.algorithm.get("eapo", None) or {}) - set(known))
    require(not unknown, "algorithm.eapo", f"some of {', '.join(known)}", unknown)


def register_trainers() -> None:
    """Add ``eapo_sync``, ``eapo_colocate_async`` and ``eapo_separate_async`` to verl's registry.

    They need TransferQueue. verl_trainer.py calls this function.
    """
    from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer

    for name in TRAINERS:
        base = get_trainer_cls(name)
        register_trainer(PREFIX + name)(type(f"EAPO{base.__name__}", (EAPOMixin, base), {"__module__": __name__}))
