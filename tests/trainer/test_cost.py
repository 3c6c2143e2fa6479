"""Model FLOPs against those that PyTorch counts, and the metrics made from them."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model, make_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trainer.evaluation import step_metrics as cost
from trainer.models.policy import Policy
from trainer.records import Rollouts, ScoredRollouts, Scores


def scored(rewards: list[float]) -> ScoredRollouts:
    """Two completions of 3 and 5 tokens each to two prompts of 4 and 6 tokens."""
    prompts, ids = [[3] * 4] * 2 + [[3] * 6] * 2, [[4] * 3, [4] * 5] * 2
    rollouts = Rollouts(prompts, ids, [torch.zeros(len(row)) for row in ids], [False] * 4)
    return ScoredRollouts(rollouts, [""] * 4, {}, Scores(torch.tensor(rewards), {}, []), [0, 0, 1, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied: bool) -> None:
    """PyTorch counts all pairs of tokens in attention, half of which the causal mask removes."""
    model = make_model(tie_word_embeddings=tied)
    model.set_attn_implementation("eager")  # the counter does not know the fused attention of CPUs
    policy, prompt, completion = Policy(model, make_tokenizer()), 9, 4
    rollouts = Rollouts([[3] * prompt], [[4] * completion], [torch.zeros(completion)], [False])
    rows = torch.arange(prompt - 1, prompt + completion - 1)
    ids = torch.full((1, prompt + completion), 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(ids, torch.ones_like(ids), rows, lambda hidden, weight, **_: hidden @ weight.T)
    masked = 2 * ids.numel() ** 2 * model.config.num_hidden_layers * model.config.hidden_size
    norms = 2 * ids.numel() * sum(weight.numel() for weight in model.parameters() if weight.ndim == 1)
    assert cost.forward_flops(policy, rollouts) == counter.get_total_flops() - masked + norms


def test_a_token_passes_through_its_experts_alone() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "head_dim": 8, "moe_intermediate_size": 12, "num_experts": 8}  # fmt: skip
    rollouts = Rollouts([[3] * 5], [[4] * 3], [torch.zeros(3)], [False])
    found = {}
    for experts in (1, 2, 8):
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=experts)
        found[experts] = cost.forward_flops(Policy(Qwen3MoeForCausalLM(config), make_tokenizer()), rollouts)
    expert = 3 * 16 * 12
    assert found[2] - found[1] == 2 * 8 * 2 * expert
    assert found[8] - found[1] == 2 * 8 * 2 * 7 * expert


def test_a_prompt_of_a_group_is_generated_from_once(policy: Policy) -> None:
    rollouts = scored([0.0] * 4).rollouts
    every, once = cost.forward_flops(policy, rollouts), cost.forward_flops(policy, rollouts, [0, 2])
    alone = sum(cost.forward_flops(policy, Rollouts([prompt], [[]], [], [])) for prompt in ([3] * 4, [3] * 6))
    assert every - once == alone


def test_cost_of_a_step(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    step = scored([1.0, 0.0, 0.5, 0.5])  # the second group has no gradient
    seconds = {"sync": 0.5, "rollouts": 2.0, "rewards": 1.0, "measurement": 0.5, "update": 4.0}
    found = cost.cost_metrics(policy, step, step, seconds, passes=2, epochs=3)
    assert {name: value for name, value in found.items() if name != "memory/peak_gib"} == {
        "share/rollout": 2.5 / 8, "share/reward": 1 / 8, "share/measurement": 0.5 / 8, "share/update": 4 / 8,
        "tokens/prompt_per_second": 20 / 2, "tokens/completion_per_second": 16 / 2,
    }  # fmt: skip
    assert 0.1 < found["memory/peak_gib"] < 1000
    monkeypatch.setattr(cost, "PEAK_FLOPS", {"": 1e9})
    forward, trained = (cost.forward_flops(policy, part.rollouts) for part in (step, step.take([0, 1])))
    generated = cost.forward_flops(policy, step.rollouts, [0, 2])
    for frozen in (False, True):
        next(iter(policy.parameters())).requires_grad_(not frozen)
        found = cost.cost_metrics(policy, step, step, seconds, passes=2, epochs=3)
        expected = generated + 2 * forward + 3 * (2 if frozen else 3) * trained
        assert found["mfu"] == pytest.approx(expected / (8 * 1e9))


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA B200", 2250e12), ("NVIDIA T4", None),
])  # fmt: skip
def test_peaks_are_found_by_name(name: str, flops: float | None) -> None:
    assert next((peak for part, peak in cost.PEAK_FLOPS.items() if part in name), None) == flops
