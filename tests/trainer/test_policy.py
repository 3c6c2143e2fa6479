"""The policy: output heads of several families, adapters, precision, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model, make_tokenizer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from eapo_kernels import token_stats
from trainer.config import LoraConfig, ModelConfig
from trainer.errors import ModelError
from trainer.models.policy import Policy, attention, load_policy

SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1}

FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2 (softcap)": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "granite (divisor)": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere (scale)": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, initializer_range=0.3)),
}
ADAPTERS = LoraConfig(rank=4, layers=(1,))


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_models_own_logits(family: str) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family]().eval()
    policy = Policy(model, make_tokenizer())
    ids = torch.tensor([[3, 4, 5, 6, 7, 1], [9, 10, 11, 0, 0, 0]])
    mask = (ids != 0).long()
    rows, targets = torch.tensor([2, 3, 4, 7]), torch.tensor([6, 7, 1, 11])
    with torch.no_grad():
        found = policy(ids, mask, rows, lambda h, w, **head: token_stats(h, w, targets, inv_temperature=1.25, **head))
        logits = model(input_ids=ids, attention_mask=mask).logits
    full = (1.25 * logits.flatten(0, 1)[rows].double()).log_softmax(-1)
    torch.testing.assert_close(found.logp.double(), full.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy.double(), -(full.exp() * full).sum(-1), atol=1e-5, rtol=0)


def test_a_head_that_is_not_understood_is_refused() -> None:
    class Halved(type(make_model())):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    model = make_model()
    model.__class__ = Halved
    with pytest.raises(ModelError, match="of its own logits, got a difference of"):
        Policy(model, make_tokenizer())


def test_adapters_train_alone_and_come_back_from_disk(model_dir: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(model_dir), device="cpu")
    policy = load_policy(config, ADAPTERS, seed=1)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name and "layers.1." in name for name in names)
    again, other = (load_policy(config, ADAPTERS, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(policy.trainable(), again.trainable(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy.trainable(), other.trainable(), strict=True))

    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.1)
    policy.save(tmp_path / "saved")
    loaded = load_policy(ModelConfig(path=str(tmp_path / "saved"), device="cpu"), LoraConfig(), seed=0)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert len(loaded.trainable()) == len(policy.trainable())
    with pytest.raises(ModelError, match=r"lora\.rank: expected 0"):
        load_policy(ModelConfig(path=str(tmp_path / "saved"), device="cpu"), ADAPTERS, seed=0)


def test_full_training_keeps_fp32_weights_and_computes_in_bf16(model_dir: Path) -> None:
    config = ModelConfig(path=str(model_dir), device="cpu", dtype="bfloat16")
    full, adapted = load_policy(config, LoraConfig(), seed=0), load_policy(config, ADAPTERS, seed=0)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in adapted.trainable()} == {torch.float32}
    ids, rows = torch.arange(6)[None], torch.arange(3)
    for policy in (full, adapted):
        dtypes = policy(ids, torch.ones_like(ids), rows, lambda h, w, **_: (h.dtype, w.dtype))
        assert dtypes == (torch.bfloat16, torch.bfloat16)


def test_recomputed_activations_give_the_same_gradients(model_dir: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(path=str(model_dir), device="cpu", gradient_checkpointing=checkpointing)
        policy = load_policy(config, LoraConfig(), seed=0)
        assert bool(policy.checkpointed) is checkpointing
        inputs = torch.arange(12).view(2, 6)
        policy(inputs, torch.ones_like(inputs), torch.arange(10), lambda h, w, **_: (h @ w.T).square().mean()).backward()
        assert not any(module.training for module in policy.modules())
        gradients.append([p.grad for p in policy.trainable()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ({"path": "no-such-model"}, {}, "expected a directory or one of smollm2-135m"),
        ({"device": "quantum"}, {}, "expected auto, cpu or cuda"),
        ({"attention": "magic"}, {}, "expected a causal language model in"),
        ({}, {"rank": 2, "targets": ("nothing",)}, "expected modules of LlamaForCausalLM"),
        ({}, {"rank": 2, "targets": ("lm_head",), "layers": ()}, "expected a plain linear output head"),
    ],
)
def test_what_cannot_be_trained_is_refused(model_dir: Path, model: dict, lora: dict, message: str) -> None:
    config = ModelConfig(**{"path": str(model_dir), "device": "cpu", **model})
    with pytest.raises(ModelError, match=message):
        load_policy(config, LoraConfig(**lora), seed=0)


@pytest.mark.parametrize(("config", "expected"), [(7, [1, 7]), ([7, 1, 8], [1, 7, 8]), (None, [1]), (0, [0, 1])])
def test_a_completion_ends_at_any_of_the_ids(config: int | list[int] | None, expected: list[int]) -> None:
    model = make_model()
    model.generation_config.eos_token_id = config
    assert Policy(model, make_tokenizer()).eos_ids == expected


@pytest.mark.parametrize(
    ("setting", "device", "dtype", "installed", "expected"),
    [
        ("auto", "cuda", "bfloat16", True, "flash_attention_2"),
        ("auto", "cuda", "bfloat16", False, "sdpa"),
        ("auto", "cuda", "float32", True, "sdpa"),
        ("auto", "cpu", "bfloat16", True, "sdpa"),
        ("eager", "cuda", "bfloat16", True, "eager"),
    ],
)
def test_flash_attention_is_taken_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: str, dtype: Any, installed: bool, expected: str
) -> None:
    monkeypatch.setattr("trainer.models.policy.is_flash_attn_2_available", lambda: installed)
    assert attention(ModelConfig(attention=setting, dtype=dtype), torch.device(device)) == expected
