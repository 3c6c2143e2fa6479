"""The policy: output heads of several families, adapters, precision, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model, make_tokenizer
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CohereConfig,
    CohereForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
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
    class Changed(type(make_model())):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = self.change(out.logits)
            return out

    model = make_model()
    model.__class__ = Changed
    model.change = lambda z: z * 0.5
    assert Policy(model, make_tokenizer()).head_options == {"softcap": None, "logit_scale": 0.5}
    model.change = lambda z: z * z.abs()
    with pytest.raises(ModelError, match="expected logits that are a scaled or soft-capped output of the head"):
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
        ({"path": "no-such-model"}, {}, "model.path: expected a folder, an embedded name .smollm2-135m"),
        ({"device": "quantum"}, {}, "expected auto, cpu or cuda"),
        ({"attention": "magic"}, {}, "expected a causal language model in"),
        ({"attention": "flash_attention_2"}, {}, "expected a causal language model in .*[Ff]lash"),
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
    ("setting", "device", "dtype", "installed", "capability", "expected"),
    [
        ("auto", "cuda", "bfloat16", (2,), 9, "flash_attention_2"),
        ("auto", "cuda", "bfloat16", (2, 3), 9, "flash_attention_3"),
        ("auto", "cuda", "bfloat16", (2, 3), 8, "flash_attention_2"),
        ("auto", "cuda", "bfloat16", (3,), 10, None),
        ("auto", "cuda", "bfloat16", (), 9, None),
        ("auto", "cuda", "float32", (2, 3), 9, None),
        ("auto", "cpu", "bfloat16", (2, 3), 9, None),
        ("eager", "cuda", "bfloat16", (2, 3), 9, "eager"),
    ],
)
def test_flash_attention_is_taken_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, setting: str, device: str, dtype: Any, installed: tuple[int, ...], capability: int,
    expected: str | None, model_dir: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with_flash_attention(monkeypatch, installed, capability)
    assert attention(ModelConfig(attention=setting, dtype=dtype), torch.device(device), model_dir) == expected
    assert capsys.readouterr().out == ""


def with_flash_attention(monkeypatch: pytest.MonkeyPatch, installed: tuple[int, ...], capability: int) -> None:
    """A Hopper GPU (capability 9) or another one, with these versions of flash attention."""
    monkeypatch.setattr("trainer.models.policy.is_flash_attn_2_available", lambda: 2 in installed)
    monkeypatch.setattr("trainer.models.policy.is_flash_attn_3_available", lambda: 3 in installed)
    monkeypatch.setattr("transformers.PreTrainedModel._flash_attn_import_error", lambda *_, **__: None)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))


@pytest.mark.parametrize("installed", [(2,), (2, 3)])
def test_a_class_without_flash_attention_is_loaded_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: tuple[int, ...]
) -> None:
    """With a line that says so."""
    DogeForCausalLM(DogeConfig(**SIZES)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with_flash_attention(monkeypatch, installed, 9)
    monkeypatch.setattr("trainer.models.policy.find_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr("trainer.models.policy.Policy", lambda model, *_: model)
    loaded: Any = load_policy(ModelConfig(path=str(tmp_path), dtype="bfloat16"), LoraConfig(), seed=0)
    assert loaded.config._attn_implementation == "sdpa"
    assert "model.attention auto: sdpa or eager, because DogeForCausalLM does not support" in capsys.readouterr().out


def test_a_model_that_sdpa_cannot_compute_is_loaded_with_eager_attention(tmp_path: Path) -> None:
    FAMILIES["gemma2 (softcap)"]().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(ModelConfig(path=str(tmp_path), device="cpu"), LoraConfig(), seed=0)
    assert policy.language_model.config._attn_implementation == "eager"


def by_sequence(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Causal attention inside the sequences that ``cu_seq_lens_q`` bounds, as variable-length kernels
    compute it.
    """
    assert mask is None
    ends = options["cu_seq_lens_q"]
    assert ends is options["cu_seq_lens_k"]
    assert ends.dtype is torch.int32
    sizes = ends.diff()
    assert options["max_length_q"] == options["max_length_k"] == sizes.max()
    groups = query.shape[1] // key.shape[1]
    parts = (t.split(sizes.tolist(), 2) for t in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    rows = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scaling"])
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(rows, 2).transpose(1, 2), None


def test_flash_attention_gets_the_bounds_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.models.policy.Policy._keeps_apart", lambda _: True)
    model = make_model()
    plain, ids, lengths = Policy(model, make_tokenizer()), torch.arange(12)[None], (3, 5, 4)
    last = torch.arange(12)
    with torch.no_grad():
        expected = plain(ids, None, last, lambda h, w, **_: h, lengths)
    AttentionInterface.register("flash_attention_by_sequence", by_sequence)
    policy = Policy(model, make_tokenizer())
    model.config._attn_implementation = "flash_attention_by_sequence"
    policy.flash = True
    with torch.no_grad():
        found = policy(ids, None, last, lambda h, w, **_: h, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flash", [False, True])
def test_auto_packs_with_flash_attention_alone(monkeypatch: pytest.MonkeyPatch, flash: bool) -> None:
    model = make_model()
    if flash:
        monkeypatch.setattr("trainer.models.policy.Policy._keeps_apart", lambda _: True)
        monkeypatch.setattr("trainer.models.policy.Policy._check_head", lambda _: None)
        model.config._attn_implementation = "flash_attention_2"
    assert Policy(model, make_tokenizer()).packed is flash
    assert not Policy(model, make_tokenizer(), packing="never").packed


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_kept_apart(family: str) -> None:
    torch.manual_seed(0)
    assert Policy(FAMILIES[family]().eval(), make_tokenizer(), packing="always").packed


def test_layers_with_a_state_along_the_row_are_not_packed() -> None:
    torch.manual_seed(0)
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    sparse = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(**SIZES, **linear, **sparse, layer_types=["linear_attention", "full_attention"])
    )
    with pytest.raises(ModelError, match=r"model\.packing: expected auto or never with Qwen3NextForCausalLM"):
        Policy(model.eval(), make_tokenizer(), packing="always")
