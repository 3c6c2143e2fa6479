"""Tiny random causal language models of many families, and a tokenizer, without downloads."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "mistral": ("Mistral", {}),
    "gemma2_softcap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_softcap": ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 0.3, "sliding_window": 16}),
    "granite_scaling": ("Granite", {"logits_scaling": 0.05, "tie_word_embeddings": False}),
    "hyperclovax_scale": ("HyperCLOVAX", {"logits_scaling": 4.0}),
    "cohere_scale": ("Cohere", {"logit_scale": 7.5}),
    "cohere2_scale": ("Cohere2", {"logit_scale": 5.0, "head_dim": 8, "sliding_window": 16}),
    "phi_bias": ("Phi", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
"""Family -> (class prefix in transformers, changes to the common sizes)."""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in eval mode, with weights large enough for softcap and scale to act."""
    import transformers

    prefix, own = FAMILIES[family]
    names = {"gemma3": "Gemma3TextConfig", "gemma3_softcap": "Gemma3TextConfig"}
    config_class = getattr(transformers, names.get(family, f"{prefix}Config"))
    kind = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config_class(**{**_SIZE, **own, **changes})).to(dtype)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(8.0)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()


def tiny_batch(*, rows: int = 3, length: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, response_mask), each [rows, length]; right-padded, response from 3."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.arange(rows) % 3 + length - 2
    attention = (torch.arange(length)[None] < lengths[:, None]).long()
    response = attention.bool() & (torch.arange(length)[None] >= 3)
    return ids * attention, attention, response


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over VOCABULARY words with <pad>, <s>, </s> and <unk>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
