"""OpenRLHF, SkyRL, NeMo-RL, AReaL and slime: the weight where each of them has just computed its advantages.

None of them hands an entropy to that place, but all have the log-probs of the sampled tokens there: H_k is estimated as the
mean of -log p (``AdvantageWeight.observe_sampled``), on this step's rollouts. Nothing of a framework is imported or patched:
these are bases, wrappers and functions that its configuration or your script names; recipes are in docs/integrations.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EapoError, require
from ..objectives.controllers import EntropyRatio
from .versions import require_hook
from .weight import STATE_FILE, AdvantageWeight


class OpenRLHFMixin:
    """Before OpenRLHF's ``RemoteExperienceMaker``: weighs the advantages of a batch of experiences.

    ``compute_advantages_and_returns`` runs in one process on the whole batch. Uses experience.action_log_probs, action_mask and
    advantages, each [B, A].
    """

    eapo: AdvantageWeight | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_hook(cls, OpenRLHFMixin, "compute_advantages_and_returns", "OpenRLHF 0.11's RemoteExperienceMaker")

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """OpenRLHF's, then the weight; metrics go to the first experience's ``info``."""
        if self.eapo is None:
            self.eapo = AdvantageWeight()
        experiences = super().compute_advantages_and_returns(experiences)  # type: ignore[misc]
        for experience in experiences:
            self.eapo.observe_sampled(experience.action_log_probs, experience.action_mask)
        self.eapo.step()
        for experience in experiences:
            experience.advantages = self.eapo.apply(experience.advantages)
            batch = len(experience.advantages)
            experience.info.update({name: value.float().expand(batch).clone() for name, value in self.eapo.metrics().items()})
        return experiences


class SkyRLMixin:
    """Before SkyRL's ``RayPPOTrainer``: weighs data["advantages"] on the driver, before the reduction is baked into them.

    Uses data["action_log_probs"], data["loss_mask"] and data["advantages"], each [B, T]; rows that only pad the batch
    (metadata["pad_size"] at its end) are not measured.
    """

    eapo: AdvantageWeight | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_hook(cls, SkyRLMixin, "compute_advantages_and_returns", "SkyRL 0.4's RayPPOTrainer")

    def compute_advantages_and_returns(self, data: Any) -> Any:
        """SkyRL's, then the weight; metrics go to ``all_metrics``."""
        if self.eapo is None:
            self.eapo = AdvantageWeight()
        data = super().compute_advantages_and_returns(data)  # type: ignore[misc]
        rows = len(data["advantages"]) - data.metadata.get("pad_size", 0)
        self.eapo.observe_sampled(data["action_log_probs"][:rows], data["loss_mask"][:rows])
        self.eapo.step()
        data["advantages"] = self.eapo.apply(data["advantages"])
        self.all_metrics.update({name: float(v) for name, v in self.eapo.metrics().items()})  # type: ignore[attr-defined]
        return data


class NemoRLEstimator:
    """Around any of NeMo-RL's advantage estimators: same call, positives weighted. It runs on the driver.

    Attributes:
        last_metrics: what NeMo-RL logs of an estimator.
    """

    def __init__(self, estimator: Any, weight: AdvantageWeight | None = None) -> None:
        """
        Args:
            estimator: one with ``compute_advantage(prompt_ids, rewards, mask, **kwargs) -> [B, S]``.
            weight: holds the controller; save and load it beside NeMo-RL's checkpoints.

        Raises:
            EapoError: the estimator has no such method.
        """
        ok = callable(getattr(estimator, "compute_advantage", None))
        require(ok, "estimator", "one of NeMo-RL's, with compute_advantage()", type(estimator).__name__)
        self.estimator, self.eapo = estimator, weight or AdvantageWeight()
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(
        self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, *, logprobs_policy: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """
        Args:
            prompt_ids, rewards: [B]-like, handed on.
            mask: [B, S], token_mask * sample_mask.
            logprobs_policy: [B, S], NeMo-RL's prev_logprobs.
            kwargs: handed on.

        Returns:
            [B, S] advantages.

        Raises:
            EapoError: no log-probs (skip_prev_logprobs).
        """
        usable = logprobs_policy is not None and bool((logprobs_policy != 0).any())
        require(usable, "logprobs_policy", "the previous policy's log-probs (no skip_prev_logprobs)", "none or zeros")
        assert logprobs_policy is not None
        advantages = self.estimator.compute_advantage(
            prompt_ids=prompt_ids, rewards=rewards, mask=mask, logprobs_policy=logprobs_policy, **kwargs
        )
        self.eapo.observe_sampled(logprobs_policy, mask)
        self.eapo.step()
        self.last_metrics = {**getattr(self.estimator, "last_metrics", {}), **_floats(self.eapo)}
        return self.eapo.apply(advantages)


class ArealMixin:
    """Before AReaL's ``PPOActor``: weighs data["advantages"] on every worker, with the entropy of all of them.

    Uses data["prox_logp"] where AReaL recomputed it, else data["logprobs"] (the rollout's), data["loss_mask"] and
    data["advantages"], each [B, S] and aligned as AReaL leaves them.
    """

    eapo: AdvantageWeight | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_hook(cls, ArealMixin, "_compute_advantages", "AReaL 1.0's PPOActor")

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        """AReaL's, then the weight. Reduces over the engine's ``data_parallel_group``."""
        if self.eapo is None:
            self.eapo = AdvantageWeight()
        data = super()._compute_advantages(data)  # type: ignore[misc]
        logp = data["prox_logp"] if data.get("prox_logp") is not None else data["logprobs"]
        self.eapo.observe_sampled(logp, data["loss_mask"])
        self.eapo.step(getattr(self.engine, "data_parallel_group", None))  # type: ignore[attr-defined]
        data["advantages"] = self.eapo.apply(data["advantages"])
        return data


_SLIME: dict[str, AdvantageWeight] = {}


def slime_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """For slime: ``--custom-advantage-function-path eapo_kernels.integrations.advantage_hooks.slime_advantages``.

    GRPO's advantages (the reward, normalised over its group by slime, at every token), positives weighted. The entropy is exact
    where slime has it (``--use-rollout-entropy``), else estimated. H_0 is kept in ``args.save``/eapo_state.json, written after
    every step, and read from ``args.load`` on the first.

    Args:
        args: slime's; normalize_advantages must be off, it would come after the weight.
        rollout_data: lists with a tensor [t] or number a response: rewards, kl, loss_masks, log_probs or rollout_log_probs,
            perhaps entropy. Gets advantages and returns.

    Raises:
        EapoError: normalize_advantages, no log-probs, or context parallelism (masks and log-probs of different lengths).
    """
    require(not args.normalize_advantages, "normalize_advantages", "False (it would undo the weight)", True)
    measured = rollout_data.get("entropy") or rollout_data.get("log_probs") or rollout_data.get("rollout_log_probs")
    if not measured:
        raise EapoError("rollout_data: expected entropy, log_probs or rollout_log_probs, got none")
    weight = _slime_weight(args)
    observe = weight.observe if rollout_data.get("entropy") else weight.observe_sampled
    for values, mask in zip(measured, rollout_data["loss_masks"], strict=True):
        if values.shape != mask.shape:
            raise EapoError(f"loss_masks: expected lengths of the log-probs (no context parallelism), got {list(mask.shape)} "
                            f"and {list(values.shape)}")  # fmt: skip
        observe(values, mask.to(values.device))
    weight.step(_slime_group())
    returns = [torch.full_like(kl, float(r)) for r, kl in zip(rollout_data["rewards"], rollout_data["kl"], strict=True)]
    rollout_data["returns"] = returns
    rollout_data["advantages"] = [weight.apply(r) for r in returns]
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank(_slime_group()) == 0
    if getattr(args, "save", None) and first:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        weight.save(args.save)


def _slime_weight(args: Any) -> AdvantageWeight:
    """This process's weight; the first call looks for the state of an earlier run."""
    if "weight" not in _SLIME:
        _SLIME["weight"] = AdvantageWeight(EntropyRatio())
        load = getattr(args, "load", None)
        if load and (Path(load) / STATE_FILE).is_file():
            _SLIME["weight"].load(load)
    return _SLIME["weight"]


def _slime_group() -> Any:
    """Megatron's data-parallel ranks; None (all) where nothing is distributed."""
    if not torch.distributed.is_initialized():
        return None
    from megatron.core import mpu

    return mpu.get_data_parallel_group()


def _floats(weight: AdvantageWeight) -> dict[str, float]:
    return {name: float(value) for name, value in weight.metrics().items()}
