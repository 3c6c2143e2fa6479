"""Patched tiny models for tests with several processes, and a loss on them."""

from __future__ import annotations

from typing import Any

import torch
from ranks import WORLD
from tiny_models import tiny_batch, tiny_model

from eapo_kernels.integrations.hf import next_token_targets, patch_causal_lm


def sharded_model(case: str) -> Any:
    """A patched Llama in training mode: "..._tied" ties the head, "...lora_head" adapts it."""
    model = tiny_model("llama_tied" if case.endswith("_tied") else "llama")
    if case.endswith("lora_head"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return patch_causal_lm(model).train()


def sharded_loss(model: Any, rows: slice) -> torch.Tensor:
    """A sum of log-probs and entropies over these rows of a batch of four."""
    ids, attention, response = (t[rows] for t in tiny_batch(rows=4))
    stats = model(input_ids=ids, attention_mask=attention, targets=next_token_targets(ids, response))
    return stats.logp.sum() + 0.3 * stats.entropy.sum()


def assert_gradients_of_one_process(found: dict[str, torch.Tensor], case: str) -> None:
    """``found``: gradients, averaged over the processes, of a batch of four rows split over them."""
    model = sharded_model(case)
    sharded_loss(model, slice(0, 4)).backward()
    expected = {name: p.grad / WORLD for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
