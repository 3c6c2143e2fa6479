#!/usr/bin/env bash
# EAPO in verl 0.9 on one node. Needs verl with a rollout engine and this package (pip install eapo-kernels),
# whose plugin registers the loss and the estimator in every process. Set the three variables below.
set -euo pipefail
: "${TRAIN_FILE:?a parquet file in the format of verl}" "${VAL_FILE:?another}" "${MODEL:?a model path or name}"

# The eapo_* trainers, and this package's op in all workers.
export VERL_USE_EXTERNAL_MODULES=eapo_kernels.integrations.verl_trainer,eapo_kernels.integrations.verl_fused

python -m verl.trainer.main_ppo \
  trainer.use_v1=True \
  trainer.v1.trainer_mode=eapo_sync \
  algorithm.adv_estimator=eapo \
  +algorithm.eapo.kappa=1.0 +algorithm.eapo.low=0.2 +algorithm.eapo.high=5.0 \
  actor_rollout_ref.actor.policy_loss.loss_mode=eapo \
  actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.2 \
  actor_rollout_ref.actor.loss_agg_mode=token-mean \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.model.use_fused_kernels=True \
  actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \
  actor_rollout_ref.rollout.n=8 \
  data.train_files="$TRAIN_FILE" data.val_files="$VAL_FILE" \
  "$@"
