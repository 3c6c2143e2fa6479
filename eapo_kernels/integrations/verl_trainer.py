"""verl's V1 trainers with the EAPO weight: ``trainer.v1.trainer_mode`` eapo_sync, eapo_colocate_async, eapo_separate_async.

Imported by name: VERL_USE_EXTERNAL_MODULES=eapo_kernels.integrations.verl_trainer. They measure H_k where verl computes the old
log-probs (same batch, mask and temperature, no further pass), feed it to the controller before the advantages are computed, log
``eapo/*`` and keep H_0 in ``global_step_N/eapo_state.json``. Settings of the controller: ``+algorithm.eapo.kappa=...`` etc.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ..errors import EapoError
from ..objectives.controllers import EntropyRatio
from .verl import HOMOGENEOUS_LOSSES, activate
from .weight import AdvantageWeight

PREFIX = "eapo_"
_SETTINGS = ("kappa", "scale", "low", "high", "ema")


class EAPOMixin:
    """Put before a V1 ``PPOTrainer`` in the bases of a class.

    Attributes:
        eapo: AdvantageWeight, with the controller.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """
        Args:
            config: verl's; ``algorithm.eapo`` may hold kappa, scale, low, high, ema and advantage.

        Raises:
            EapoError: an estimator, loss or rollout correction that the weight does not go with, or an unknown setting.
        """
        config = copy.deepcopy(config)
        # verl compares this name with "sync": the trainers behave as what they are derived from.
        config.trainer.v1.trainer_mode = str(config.trainer.v1.trainer_mode).removeprefix(PREFIX)
        _check(config)
        section = config.algorithm.get("eapo", None) or {}
        unknown = sorted(set(section) - {*_SETTINGS, "advantage"})
        if unknown:
            raise EapoError(f"algorithm.eapo: expected some of {', '.join((*_SETTINGS, 'advantage'))}, got {unknown}")
        self.eapo = AdvantageWeight(EntropyRatio(**{name: float(section[name]) for name in _SETTINGS if name in section}))
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """verl's pass; its entropies become the step's weight."""
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
        """verl's, whose estimator ``eapo`` applies the weight."""
        activate(self.eapo)
        return super()._compute_advantage(batch, metrics)  # type: ignore[misc]

    def _save_checkpoint(self) -> Any:
        """The controller first: verl ends with the marker that makes a checkpoint the latest."""
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
            found = settings.resume_mode == "resume_path"
            folder = settings.resume_from_path if found else f"{settings.default_local_dir}/global_step_{trainer.global_steps}"
            self.eapo.load(folder)
        return result


def _check(config: Any) -> None:
    estimator, loss = config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.get("loss_mode", "vanilla")
    if estimator != "eapo":
        raise EapoError(f"algorithm.adv_estimator: expected 'eapo' with an eapo_ trainer, got {estimator!r}")
    if loss not in HOMOGENEOUS_LOSSES:
        raise EapoError(
            f"actor.policy_loss.loss_mode: expected one of {', '.join(HOMOGENEOUS_LOSSES)} (positively homogeneous in the "
            f"advantage), got {loss!r}"
        )
    correction = config.algorithm.get("rollout_correction", None)
    if correction and correction.get("bypass_mode", False):
        raise EapoError("algorithm.rollout_correction.bypass_mode: expected False (the entropy comes from that pass), got True")


def register_trainers() -> None:
    """Add ``eapo_`` + name for each of verl's V1 trainers to verl's table."""
    from verl.trainer.ppo.v1 import get_trainer_cls, register_trainer

    for name in ("sync", "colocate_async", "separate_async"):
        base = get_trainer_cls(name)
        register_trainer(PREFIX + name)(type(f"EAPO{base.__name__}", (EAPOMixin, base), {"__module__": __name__}))


register_trainers()
