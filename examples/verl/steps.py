"""verl's functions with this package's loss, estimator and op, in one process on a CPU.

run.sh runs the same training with verl's trainer on GPUs.

make test-verl                                # sets up .venv-verl
.venv-verl/bin/python examples/verl/steps.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto  # importing verl has registered the plugin
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.workers.config import ActorConfig

from eapo_kernels.integrations import AdvantageWeight
from eapo_kernels.integrations.verl import activate, install_fused_op

sys.path.append(str(Path(__file__).parent.parent))
import tiny

PROMPTS, RESPONSES, LENGTH, STEPS = 4, 8, 12, 20


def main() -> None:
    torch.manual_seed(0)
    model = tiny.model()
    kind = type(model)
    plain = kind.forward
    install_fused_op()
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    fused = kind.forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    weight, config = AdvantageWeight(), ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=8, rollout_n=RESPONSES)
    activate(weight)
    prompts = torch.randint(4, len(tiny.WORDS), (PROMPTS, 3)).repeat_interleave(RESPONSES, 0)
    mask = torch.ones(len(prompts), LENGTH, dtype=torch.int64)
    for step in range(STEPS):
        kind.forward = plain  # verl samples with another engine
        ids = model.generate(prompts, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=True, top_k=0)
        kind.forward = fused
        kept = slice(prompts.shape[1] - 1, -1)
        with torch.no_grad():
            old = model(input_ids=ids, return_dict=True)
        weight.observe(old.entropy[:, kept], mask)
        weight.step()
        reward = (ids[:, prompts.shape[1] :] % 2 == 0).float().mean(-1)
        rewards = torch.zeros(len(ids), LENGTH)
        rewards[:, -1] = reward
        data = DataProto(
            batch=TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=[len(ids)]),
            non_tensor_batch={"uid": np.repeat(np.arange(PROMPTS), RESPONSES).astype(object)},
        )
        advantages = compute_advantage(data, adv_estimator="eapo", config=OmegaConf.create({})).batch["advantages"]
        loss, _ = get_policy_loss_fn("eapo")(
            old_log_prob=old.log_probs[:, kept], log_prob=model(input_ids=ids, return_dict=True).log_probs[:, kept],
            advantages=advantages, response_mask=mask, loss_agg_mode="token-mean", config=config,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0 or step == STEPS - 1:
            entropy = weight.controller.entropy
            print(f"step {step:2d}  reward {reward.mean():.3f}  entropy {entropy:.3f}  weight {weight.weight:.3f}")


if __name__ == "__main__":
    main()
