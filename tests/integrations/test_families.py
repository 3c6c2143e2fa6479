"""Every causal family of the installed transformers: its head is learned and compared, or refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch

from eapo_kernels import EapoError
from eapo_kernels.integrations.hf import next_token_targets, patch_causal_lm
from eapo_kernels.integrations.own_logits import logit_transform
from trainer.models.limits import positions

transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "attention_hidden_size": 32, "lru_width": 32,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "state_size": 8,
}  # fmt: skip
"""Of a tiny model, under every name that configs use; each config takes the names that it knows."""

OWN: dict[str, dict[str, Any]] = {
    "mla": {"head_dim": 4, "num_key_value_heads": 4},
    "bamba": {"mamba_d_head": 16}, "granitemoehybrid": {"mamba_d_head": 16},
    "beam": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 7.5}, "cohere2": {"logit_scale": 0.3},
    "dots1": {"n_shared_experts": 1}, "falcon": {"head_dim": None}, "falcon_h1": {"lm_head_multiplier": 0.3},
    "gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {"final_logit_softcapping": 1.5},
    "gemma4_text": {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "granite": {"logits_scaling": 0.05},
    "granitemoe": {"logits_scaling": 6.0}, "granitemoeshared": {"logits_scaling": 0.2},
    "hyperclovax": {"logits_scaling": 4.0},
    "minicpm3": {"dim_model_base": 64}, "nanochat": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "vaultgemma": {"final_logit_softcapping": 2.0}, "xlstm": {"v_head_dim": None, "output_logit_soft_cap": 2.0},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Family -> changes to ``SIZES`` (None: the name is not given); scales and caps that differ from 1 and act."""
MLA = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3",
    "sarvam_mla", "youtu",
)  # fmt: skip
"""Families whose attention heads have the size of the rotary part, OWN["mla"]."""

NOT_TINY = {
    **dict.fromkeys(
        ("blt", "dbrx", "fuyu", "gemma3", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant",
         "git", "got_ocr2", "inkling2_loop_text", "inkling2_text", "kimi_linear", "moss_transcribe_diarize", "phi4_multimodal",
         "roc_bert"),
        "sizes in parts of the config with names of their own",
    ),
    **dict.fromkeys(
        ("cohere_compass_text", "dots3_note", "dots3_note_text", "gemma3n_text", "lfm2_moe", "mamba2", "prophetnet", "reformer",
         "xlnet", "zamba", "zamba2"),
        "the config refuses common sizes, or needs a layout of layers",
    ),
    "gemma3n": "needs the package timm",
    "xmod": "needs a language",
}  # fmt: skip
"""Family -> why it is not compared."""

REFUSED = {
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "modernbert-decoder", "rembert",
         "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        "expected a head that receives the backbone's last_hidden_state",  # BERT's head has a dense layer before
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "head: expected nn.Linear"),  # a head for each codebook
    "dory": "head: expected a plain nn.Linear",
}  # fmt: skip
"""Family -> the error that it is refused with."""


def _tiny(family: str, **changes: Any) -> Any:
    """A random model in eval mode, with weights large enough for softcap and scale to act."""
    kind = getattr(transformers, FAMILIES[family])
    make = kind.config_class
    sizes = SIZES | (OWN["mla"] if family in MLA else {}) | OWN.get(family, {}) | changes
    known = {*inspect.signature(make.__init__).parameters, *dir(make), *make.attribute_map}
    torch.manual_seed(0)
    model = kind(make(**{name: value for name, value in sizes.items() if value is not None and name in known})).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        if isinstance(head, torch.nn.Linear):
            head.weight.mul_(8.0)
            if head.bias is not None:
                head.bias.normal_()
    return model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_TINY and name not in REFUSED])
@torch.no_grad()
def test_log_probs_are_those_of_the_models_own_logits(family: str) -> None:
    model = _tiny(family)
    ids = tiny_batch()[0].clamp_min(3)
    logits = model(input_ids=ids, use_cache=False).logits.double()
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    patch_causal_lm(model)
    logp = model(input_ids=ids, targets=next_token_targets(ids), entropy="none").logp[:, :-1]
    assert (logp - expected).abs().max() < 1e-5
    head = model.get_output_embeddings()
    acts = [
        name
        for name in OWN.get(family, {})
        if "softcap" in name or "soft_cap" in name or "scal" in name or "multiplier" in name
    ]
    assert not acts or (head.softcap, head.logit_scale) != (None, None)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_TINY and "musicgen" not in name])
@torch.no_grad()
def test_learned_positions_are_those_that_the_model_takes(family: str) -> None:
    model = _tiny(family)
    held, _ = positions(model)

    def fits(length: int) -> bool:
        try:
            model(input_ids=torch.full((1, length), 5), use_cache=False)
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    assert fits(held or SIZES["n_ctx"])
    assert fits((held or SIZES["n_ctx"]) + 1) == (held is None)


@pytest.mark.parametrize("family", [name for name in REFUSED if name in FAMILIES])
def test_what_does_not_fit_is_refused(family: str) -> None:
    model = _tiny(family)
    with pytest.raises(EapoError, match=REFUSED[family]):
        patch_causal_lm(model, check=False)
    assert "forward" not in vars(model)
    assert type(model).__module__.startswith("transformers."), "left as it was"


def test_most_families_are_compared() -> None:
    assert len(set(FAMILIES) - set(NOT_TINY) - set(REFUSED)) >= 100
    assert len(NOT_TINY) < 0.2 * len(FAMILIES)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("hyperclovax", {"logits_scaling": 3.0}, (None, 3.0)),  # multiplies
        ("granite", {"logits_scaling": 4.0}, (None, 0.25)),  # divides by the same name
        ("cohere", {"logit_scale": 0.0625}, (None, 0.0625)),
        ("falcon_h1", {"lm_head_multiplier": 0.4}, (None, 0.4)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (30.0, None)),  # far above the logits of a new model
        ("recurrent_gemma", {"logits_soft_cap": 25.0}, (25.0, None)),
        ("llama", {}, (None, None)),
    ],
)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "meta"])
def test_cap_and_scale_are_exact_in_any_dtype_and_without_weights(
    family: str, changes: dict[str, Any], expected: tuple[float | None, float | None], how: str
) -> None:
    model = _tiny(family, **changes)
    model = model.to("meta") if how == "meta" else model.to(getattr(torch, how))
    assert logit_transform(model) == expected
    if how == "meta":
        with pytest.raises(EapoError, match="expected weights to compare logits with"):
            patch_causal_lm(copy.copy(model))
        patch_causal_lm(_tiny(family, **changes).to("meta"), check=False)


def test_another_function_of_the_logits_is_refused() -> None:
    model = _tiny("llama")
    forward = type(model).forward

    class Squared(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits * output.logits.abs()
            return output

    class OneColumn(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits[..., 5] = -1e9
            return output

    for kind in (Squared, OneColumn):
        model.__class__ = kind
        with pytest.raises(EapoError, match="expected logits that are a scaled or soft-capped output of the head"):
            patch_causal_lm(model)
