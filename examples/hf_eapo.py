"""EAPO in a plain PyTorch loop with a transformers model. Runs on a CPU in seconds.

.venv/bin/python examples/hf_eapo.py
"""

from __future__ import annotations

import tiny
import torch

from eapo_kernels import EntropyRatio, TokenBatch, eapo_loss
from eapo_kernels.integrations.hf import next_token_targets, patch_causal_lm

PROMPTS, RESPONSES, LENGTH, STEPS = 4, 8, 12, 20


def reward(tokens: torch.Tensor) -> torch.Tensor:
    """Share of words with an even number, which a random model can learn."""
    return (tokens % 2 == 0).float().mean(-1)


def main() -> None:
    torch.manual_seed(0)
    model = patch_causal_lm(tiny.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    controller = EntropyRatio()  # save controller.state_dict() in your checkpoint
    prompts = torch.randint(4, len(tiny.WORDS), (PROMPTS, 3)).repeat_interleave(RESPONSES, 0)
    group_ids = torch.arange(PROMPTS).repeat_interleave(RESPONSES)
    for step in range(STEPS):
        ids = model.generate(prompts, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=True, top_k=0)
        response = (torch.arange(ids.shape[1]) >= prompts.shape[1]).expand_as(ids)
        targets = next_token_targets(ids, response)
        counted = targets != -100

        with torch.no_grad():  # old policy: log-probs for the ratio, entropies for the weight
            old = model(input_ids=ids, targets=targets)
        weight = controller.update(old.entropy.sum(), counted.sum())
        rewards = reward(ids[:, prompts.shape[1] :])
        batch = TokenBatch(
            targets=targets.flatten(),
            sequence_ids=torch.arange(len(ids)).repeat_interleave(ids.shape[1]),
            rewards=rewards,
            group_ids=group_ids,
            old_logp=old.logp.flatten(),
            mask=counted.flatten(),  # on a GPU, masked rows are compacted away
        )

        def loss_of(hidden, head, batch=batch, weight=weight, **options):
            """Called inside the model's forward with hidden states and the head's weight."""
            return eapo_loss(hidden.flatten(0, 1), head, batch, positive_weight=weight, **options).loss

        loss = model(input_ids=ids, compute=loss_of)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  reward {rewards.mean():.3f}  entropy {controller.entropy:.3f}  weight {weight:.3f}")


if __name__ == "__main__":
    main()
