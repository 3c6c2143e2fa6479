"""The weights handed to an engine equal those that ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import WORDS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from trainer.errors import ModelError
from trainer.models.policy import Policy
from trainer.models.weights import checkpoint_weights


def adapted(model: Any, **options: Any) -> Any:
    """Adapters with an effect: B would start from zero."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, **{"target_modules": ["q_proj", "down_proj"], **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def same(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(found[name].float(), weight.float(), atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_names_and_values_of_a_dense_model(tmp_path: Path, tied: bool, lora: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    model = adapted(model) if lora else model
    found = {name: weight.clone() for name, weight in checkpoint_weights(Policy(model, make_tokenizer()).language_model)}
    (model.merge_and_unload() if lora else model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    same(found, saved)


def test_experts_are_stacked_in_memory_and_single_in_the_file(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in model.state_dict())
    same(
        dict(checkpoint_weights(Policy(model.eval(), make_tokenizer()).language_model)),
        load_file(tmp_path / "model.safetensors"),
    )


def test_frozen_weights_in_bf16_are_merged_in_fp32() -> None:
    policy = Policy(adapted(make_model().to(torch.bfloat16)), make_tokenizer(), torch.bfloat16)
    found = dict(checkpoint_weights(policy.language_model))["model.layers.0.self_attn.q_proj.weight"]
    layer = policy.language_model.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    wanted = layer.base_layer.weight.double() + 4 * b @ a
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=0)
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, r"lora_B\.default\.bias"),
        ({"modules_to_save": ["gate_proj"]}, "original_module"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(options: dict[str, Any], weight: str) -> None:
    policy = Policy(adapted(make_model(), **options), make_tokenizer())
    with pytest.raises(ModelError, match=rf"expected plain LoRA on linear layers \(or none\) to merge, got .*{weight}"):
        list(checkpoint_weights(policy.language_model))
