"""The transformers engine: where a completion ends, and which log-probs are recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model, make_tokenizer, no_tick
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models.policy import Policy
from trainer.records import Rollouts, Sampling
from trainer.rollouts.transformers_engine import TransformersEngine

PROMPTS = [[5, 6, 7, 12, 8], [9], [10, 11, 12]]
SAMPLING = Sampling(responses=6, max_new_tokens=10, temperature=0.7, top_p=1.0, seed=5)


def generate(policy: Policy, sampling: Sampling = SAMPLING, batch: int = 64) -> Rollouts:
    return TransformersEngine(policy, batch).generate(PROMPTS, sampling, no_tick)


def teacher_forced(policy: Policy, rollouts: Rollouts, temperature: float) -> list[torch.Tensor]:
    """Scaled log-probs over the full vocabulary at every response position, one completion at a
    time, no padding.
    """
    result = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        result.append((logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1))
    return result


def test_a_completion_ends_with_its_eos_and_never_holds_another(policy: Policy) -> None:
    rollouts = generate(policy)
    assert len(rollouts.completion_ids) == 18
    assert rollouts.prompt_ids == [prompt for prompt in PROMPTS for _ in range(6)]
    assert 0 < sum(rollouts.truncated) < 18
    for ids, logp, truncated in zip(rollouts.completion_ids, rollouts.logp, rollouts.truncated, strict=True):
        assert len(ids) == len(logp) <= 10
        assert 1 not in ids[:-1]
        assert (ids[-1] == 1) is not truncated
        assert not truncated or len(ids) == 10


@pytest.mark.parametrize("batch", [64, 4])
def test_recorded_log_probs_are_the_teacher_forced_ones(policy: Policy, batch: int) -> None:
    rollouts = generate(policy, batch=batch)
    dense = teacher_forced(policy, rollouts, SAMPLING.temperature)
    for ids, logp, full in zip(rollouts.completion_ids, rollouts.logp, dense, strict=True):
        torch.testing.assert_close(logp.double(), full.gather(1, torch.tensor(ids)[:, None])[:, 0], atol=2e-5, rtol=0)


def test_nucleus_sampling_records_the_cut_distribution(policy: Policy) -> None:
    rollouts = generate(policy, Sampling(6, 10, 0.7, 0.5, seed=1))
    dense = teacher_forced(policy, rollouts, 0.7)
    for ids, logp, full in zip(rollouts.completion_ids, rollouts.logp, dense, strict=True):
        for token, got, row in zip(ids, logp.tolist(), full, strict=True):
            ordered = row.exp().sort(descending=True)
            kept = ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1]
            assert token in kept
            assert got == pytest.approx((row[token] - row[kept].logsumexp(0)).item(), abs=2e-5)


def left_by(logits: torch.Tensor, sampling: Sampling) -> list[int]:
    """The ids that top-k, then top-p, then min-p leave of one row of scaled logits, by their
    definitions.
    """
    order = logits.argsort(descending=True)[: sampling.top_k or None]
    p = logits[order].softmax(0)
    order = order[p.cumsum(0) - p < sampling.top_p]
    p = logits[order].softmax(0)
    return sorted(order[p >= sampling.min_p * p[0]].tolist())


CUTS = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 7},
    "min_p": {"min_p": 0.3},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.1},
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_support_is_what_the_filters_left(policy: Policy, cut: str) -> None:
    """Ids, and the log-probs of the drawn tokens among them, for any batch."""
    sampling = replace(SAMPLING, **CUTS[cut])
    rollouts = generate(policy, sampling)
    assert rollouts.support is not None
    assert not all(rollouts.truncated), "support after the end of a completion is left out"
    sizes = set()
    rows = zip(rollouts.completion_ids, rollouts.logp, rollouts.support, teacher_forced(policy, rollouts, 0.7), strict=True)
    for ids, logp, support, full in rows:
        assert support.ids.dtype == support.counts.dtype == torch.int32
        assert len(support.counts) == len(ids)
        for token, got, kept, row in zip(ids, logp, support.ids.split(support.counts.tolist()), full, strict=True):
            assert kept.tolist() == left_by(row, sampling)
            assert token in kept
            assert got.item() == pytest.approx((row[token] - row[kept.long()].logsumexp(0)).item(), abs=2e-5)
            sizes.add(len(kept))
    assert max(sizes) < 49
    assert cut == "top_k" or len(sizes) > 3
    again = generate(policy, sampling, batch=4).support
    assert again is not None
    for one, other in zip(rollouts.support, again, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.counts, other.counts)


def test_without_a_filter_no_support_is_recorded(policy: Policy) -> None:
    assert generate(policy).support is None
    assert generate(policy, replace(SAMPLING, top_p=0.5, record_support=False)).support is None


def test_the_models_own_sampling_defaults_do_not_leak_in() -> None:
    plain, altered = (Policy(make_model(), make_tokenizer()) for _ in range(2))
    own = altered.language_model.generation_config
    own.top_k, own.repetition_penalty, own.temperature, own.min_new_tokens = 3, 1.5, 0.1, 8
    assert generate(altered).completion_ids == generate(plain).completion_ids
    assert altered.language_model.generation_config is own


def test_completions_depend_on_the_seed_and_leave_global_random_numbers_alone(policy: Policy) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = generate(policy)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(1)
    assert generate(policy).completion_ids == first.completion_ids
    assert generate(policy, Sampling(6, 10, 0.7, 1.0, seed=6)).completion_ids != first.completion_ids


def test_a_completion_does_not_depend_on_its_batch(policy: Policy) -> None:
    """Nor on the number of other prompts."""
    together = generate(policy)
    assert generate(policy, batch=4).completion_ids == together.completion_ids
    alone = TransformersEngine(policy, 64).generate(PROMPTS[:1], SAMPLING, no_tick)
    assert alone.completion_ids == together.completion_ids[:6]
    assert len({tuple(ids) for ids in alone.completion_ids}) > 1


SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
HEADS = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether prompts are shared, sizes
    "llama": (True, HEADS),
    "gemma2": (True, {**HEADS, "sliding_window": 4}),  # shorter than a prompt
    "mistral": (True, {**HEADS, "sliding_window": 3}),
    "gpt2": (True, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": (True, {"ffn_dim": 48, "word_embed_proj_dim": 32, "bos_token_id": 1}),  # positions from the mask
    "bloom": (True, {"n_layer": 2, "n_head": 4}),  # distances in the place of positions
    "qwen3_moe": (True, {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "deepseek_v3": (True, {
        "intermediate_size": 48, "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    }),
    "mamba": (False, {"state_size": 4}),
    "jamba": (False, {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
                      "use_mamba_kernels": False}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_computed_once_for_all_its_completions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts of 1 to 5 tokens, where the model continues from a cache: the completions and their log-probs are
    those without sharing.
    """
    shared, sizes = FAMILIES[family]
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **sizes}, initializer_range=0.2, pad_token_id=0)
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    engine = TransformersEngine(policy, 64)
    assert engine._continues is shared
    found, flops = [], []
    for continues in (shared, False):
        monkeypatch.setattr(TransformersEngine, "_continues", continues)
        with FlopCounterMode(display=False) as counter:
            found.append(TransformersEngine(policy, 64).generate(PROMPTS, SAMPLING, no_tick))
        flops.append(counter.get_total_flops())
    assert found[0].completion_ids == found[1].completion_ids
    assert len({tuple(ids) for ids in found[0].completion_ids}) > 4
    for ours, theirs in zip(found[0].logp, found[1].logp, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert (flops[0] < flops[1]) is shared


def test_sampling_follows_the_distribution(policy: Policy) -> None:
    """2,000 first tokens against the model's probabilities: chi-square of the ten most likely and
    the rest.
    """
    rollouts = TransformersEngine(policy, 2000).generate([PROMPTS[0]], Sampling(2000, 1, 1.3, 1.0, 0), no_tick)
    with torch.no_grad():
        p = (policy.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.3).softmax(-1)
    top = p.topk(10).indices
    counts = torch.bincount(torch.tensor([ids[0] for ids in rollouts.completion_ids]), minlength=len(p))
    observed = torch.cat([counts[top], counts.sum(0, keepdim=True) - counts[top].sum()])
    expected = 2000 * torch.cat([p[top], 1 - p[top].sum(0, keepdim=True)])
    assert ((observed - expected) ** 2 / expected).sum() < 29.6  # 0.1 % quantile of chi-square with 10 degrees
